//! The embedded store as workers see it: its calls travel over the control stream to the master.

use async_trait::async_trait;

use super::{Channel, NewMessage, Page, Posted, Range, Store, StoreError, User};
use crate::control::{StoreRequest, StoreResponse};
use crate::worker::link::Link;

/// A store at the other end of the control stream. What its bus delivers arrives there too, as
/// [`crate::control::FromMaster::Bus`].
pub struct ControlStore {
    link: Link,
}

impl ControlStore {
    /// The store of the master that `link` leads to.
    pub fn new(link: Link) -> Self {
        Self { link }
    }

    async fn call(&self, request: StoreRequest) -> Result<StoreResponse, StoreError> {
        self.link
            .store(request)
            .await
            .map_err(|away| StoreError::Unavailable(away.to_string()))?
    }

    async fn done(&self, request: StoreRequest) -> Result<(), StoreError> {
        match self.call(request).await? {
            StoreResponse::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }
}

/// The answer is not named: it may hold a password's hash.
fn unexpected() -> StoreError {
    StoreError::Unavailable("the master answered another question".to_owned())
}

#[async_trait]
impl Store for ControlStore {
    async fn create_user(&self, user: User) -> Result<(), StoreError> {
        self.done(StoreRequest::CreateUser(user)).await
    }

    async fn user(&self, name: &str) -> Result<Option<User>, StoreError> {
        match self
            .call(StoreRequest::User {
                name: name.to_owned(),
            })
            .await?
        {
            StoreResponse::User(user) => Ok(user),
            _ => Err(unexpected()),
        }
    }

    async fn replace_hash(&self, name: &str, from: &str, to: &str) -> Result<(), StoreError> {
        let (name, from, to) = (name.to_owned(), from.to_owned(), to.to_owned());
        self.done(StoreRequest::ReplaceHash { name, from, to })
            .await
    }

    async fn channels(&self) -> Result<Vec<Channel>, StoreError> {
        match self.call(StoreRequest::Channels).await? {
            StoreResponse::Channels(channels) => Ok(channels),
            _ => Err(unexpected()),
        }
    }

    async fn create_channel(&self, channel: Channel) -> Result<(), StoreError> {
        self.done(StoreRequest::CreateChannel(channel)).await
    }

    async fn post(&self, message: NewMessage) -> Result<Posted, StoreError> {
        match self.call(StoreRequest::Post(message)).await? {
            StoreResponse::Posted(posted) => Ok(posted),
            _ => Err(unexpected()),
        }
    }

    async fn read(&self, channel: &str, range: Range) -> Result<Page, StoreError> {
        match self
            .call(StoreRequest::Read {
                channel: channel.to_owned(),
                range,
            })
            .await?
        {
            StoreResponse::Page(page) => Ok(page),
            _ => Err(unexpected()),
        }
    }

    async fn last_before(&self, channel: &str, millis: i64) -> Result<u64, StoreError> {
        let channel = channel.to_owned();
        match self
            .call(StoreRequest::LastBefore { channel, millis })
            .await?
        {
            StoreResponse::Id(id) => Ok(id),
            _ => Err(unexpected()),
        }
    }

    async fn subscribe(&self, channel: &str) -> Result<u64, StoreError> {
        match self
            .call(StoreRequest::Subscribe {
                channel: channel.to_owned(),
            })
            .await?
        {
            StoreResponse::Id(id) => Ok(id),
            _ => Err(unexpected()),
        }
    }

    async fn unsubscribe(&self, channel: &str) -> Result<(), StoreError> {
        self.done(StoreRequest::Unsubscribe {
            channel: channel.to_owned(),
        })
        .await
    }

    async fn typing(&self, channel: &str, user: &str) -> Result<(), StoreError> {
        let (channel, user) = (channel.to_owned(), user.to_owned());
        self.done(StoreRequest::Typing { channel, user }).await
    }
}

/// Carries out a request that came over a control stream: the master's side.
///
/// # Errors
/// Those of the store.
pub async fn carry_out(
    store: &dyn Store,
    request: StoreRequest,
) -> Result<StoreResponse, StoreError> {
    use StoreRequest as R;
    Ok(match request {
        R::CreateUser(user) => {
            store.create_user(user).await?;
            StoreResponse::Done
        }
        R::User { name } => StoreResponse::User(store.user(&name).await?),
        R::ReplaceHash { name, from, to } => {
            store.replace_hash(&name, &from, &to).await?;
            StoreResponse::Done
        }
        R::Channels => StoreResponse::Channels(store.channels().await?),
        R::CreateChannel(channel) => {
            store.create_channel(channel).await?;
            StoreResponse::Done
        }
        R::Post(message) => StoreResponse::Posted(store.post(message).await?),
        R::Read { channel, range } => StoreResponse::Page(store.read(&channel, range).await?),
        R::LastBefore { channel, millis } => {
            StoreResponse::Id(store.last_before(&channel, millis).await?)
        }
        R::Subscribe { channel } => StoreResponse::Id(store.subscribe(&channel).await?),
        R::Unsubscribe { channel } => {
            store.unsubscribe(&channel).await?;
            StoreResponse::Done
        }
        R::Typing { channel, user } => {
            store.typing(&channel, &user).await?;
            StoreResponse::Done
        }
    })
}
