//! What every [`Store`] promises (`suite`), run against each of them, and what only the embedded
//! one (`embedded`) and only the one in Redis promise (`in_redis`).

// The exemption of tests does not reach the helpers that they share.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use banter::store::{
    BusEvent, BusSink, Channel, Import, ImportError, Imported, Message, NewMessage, PAGE_LIMIT,
    Page, Posted, Range, Store, StoreError, User,
};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// How long anything is waited for.
const DEADLINE: Duration = Duration::from_secs(20);

/// Opens stores for the suite. A new harness holds nothing yet.
trait Harness {
    /// A store of its own (a worker's, so to speak), whose events go to `sink`.
    async fn open(&self, sink: BusSink) -> Arc<dyn Store>;

    /// As [`open`](Self::open), with nobody listening, to import into.
    async fn open_to_import(&self) -> Arc<dyn Import>;

    /// Restarts what the stores stand on; those opened before are of no use any more.
    async fn restart(&self);
}

/// Collects what a sink is given.
#[derive(Default)]
struct Ear {
    events: Mutex<Vec<BusEvent>>,
    changed: Notify,
}

impl Ear {
    /// A new ear and the sink that it listens at.
    fn new() -> (Arc<Self>, BusSink) {
        Self::accepting(|_| true)
    }

    /// A new ear and its sink, which refuses what `accepts` does not accept.
    fn accepting(accepts: fn(&BusEvent) -> bool) -> (Arc<Self>, BusSink) {
        let ear = Arc::new(Self::default());
        let listening = Arc::clone(&ear);
        let sink = Arc::new(move |event| {
            let accepted = accepts(&event);
            listening.events.lock().push(event);
            listening.changed.notify_waiters();
            accepted
        });
        (ear, sink)
    }

    /// The ids of what was heard on a channel, in that order.
    fn ids(&self, channel: &str) -> Vec<u64> {
        self.messages(channel)
            .iter()
            .map(|message| message.id)
            .collect()
    }

    fn messages(&self, channel: &str) -> Vec<Message> {
        let events = self.events.lock();
        let of_channel = events.iter().filter_map(|event| match event {
            BusEvent::Message {
                channel: on,
                message,
            } if on == channel => Some(message.clone()),
            _ => None,
        });
        of_channel.collect()
    }

    /// Who was heard typing, and where.
    fn typing(&self) -> Vec<(String, String)> {
        let events = self.events.lock();
        let typing = events.iter().filter_map(|event| match event {
            BusEvent::Typing { channel, user } => Some((channel.clone(), user.clone())),
            _ => None,
        });
        typing.collect()
    }

    /// Waits until what was heard satisfies a condition.
    async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let waiting = async {
            loop {
                // Made before the look, so that nothing between look and wait is missed.
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if condition(self) {
                    return;
                }
                changed.await;
            }
        };
        let timely = tokio::time::timeout(DEADLINE, waiting).await;
        timely.unwrap_or_else(|_| panic!("never heard {what}; heard {:?}", self.events.lock()));
    }

    /// Waits until the channel's message `id` was heard.
    async fn until_id(&self, channel: &str, id: u64) {
        self.until(&format!("message {id} of {channel}"), |ear| {
            ear.ids(channel).contains(&id)
        })
        .await;
    }
}

fn deaf() -> BusSink {
    Arc::new(|_| true)
}

/// A message whose nonce is its text.
fn message(channel: &str, user: &str, text: &str) -> NewMessage {
    NewMessage {
        channel: channel.to_owned(),
        user: user.to_owned(),
        message: text.to_owned(),
        nonce: text.to_owned(),
        client_nonce: false,
        sender: format!("{user}'s connection"),
    }
}

async fn post(store: &Arc<dyn Store>, channel: &str, text: &str) -> Posted {
    store.post(message(channel, "anna", text)).await.unwrap()
}

/// Posts `count` messages to a channel, all at once. Returns what came of them by id.
async fn post_many(
    stores: &[Arc<dyn Store>],
    channel: &str,
    count: usize,
) -> BTreeMap<u64, (String, Posted)> {
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..count {
        let store = Arc::clone(&stores[n % stores.len()]);
        let text = format!("message {n}");
        let new = message(channel, "anna", &text);
        tasks.spawn(async move { (text, store.post(new).await.unwrap()) });
    }
    let posted = tasks.join_all().await;
    posted
        .into_iter()
        .map(|(text, posted)| (posted.id, (text, posted)))
        .collect()
}

/// Messages to import, named by numbers. Each is a second later than the one before.
fn batch(numbers: std::ops::RangeInclusive<u64>) -> Vec<Imported> {
    numbers
        .map(|n| Imported {
            user: format!("author {}", n % 3),
            message: format!("imported \"{n}\""),
            millis: i64::try_from(n).unwrap() * 1000,
        })
        .collect()
}

/// Id, author, text and date of every message of a channel.
async fn all(store: &Arc<dyn Store>, channel: &str) -> Vec<(u64, String, String, String)> {
    let mut all: Vec<(u64, String, String, String)> = Vec::new();
    loop {
        let id = all.last().map_or(0, |(id, ..)| *id);
        let limit = PAGE_LIMIT;
        let page = store.read(channel, Range::After { id, limit }).await;
        let page = page.unwrap();
        if page.messages.is_empty() {
            assert_eq!(page.last, id);
            return all;
        }
        all.extend(page.messages.iter().map(|message| {
            let event = event(message);
            assert_eq!(event["id"], message.id);
            assert_eq!(event["channel"], channel);
            assert_eq!(event["user"], *message.user);
            let text = |name: &str| event[name].as_str().unwrap().to_owned();
            (message.id, text("user"), text("message"), text("date"))
        }));
    }
}

fn ids(page: &Page) -> Vec<u64> {
    page.messages.iter().map(|message| message.id).collect()
}

/// The event of a message, as a client would parse it.
fn event(message: &Message) -> serde_json::Value {
    serde_json::from_str(message.event.get()).unwrap()
}

fn user(name: &str, hash: &str) -> User {
    User {
        name: name.to_owned(),
        password_hash: hash.to_owned(),
    }
}

mod suite {
    use super::*;

    pub async fn of_two_registrations_at_once_one_wins(harness: &impl Harness) {
        let stores = [harness.open(deaf()).await, harness.open(deaf()).await];
        for round in 0..20 {
            let name = format!("user {round}");
            let mut tasks = tokio::task::JoinSet::new();
            for n in 0..8 {
                let store = Arc::clone(&stores[n % 2]);
                let new = user(&name, &format!("hash {n}"));
                tasks.spawn(async move { (store.create_user(new.clone()).await, new) });
            }
            let (won, lost): (Vec<_>, Vec<_>) = tasks
                .join_all()
                .await
                .into_iter()
                .partition(|(result, _)| result.is_ok());
            assert_eq!(won.len(), 1, "round {round}");
            assert!(
                lost.iter()
                    .all(|(result, _)| *result == Err(StoreError::Exists))
            );
            let winner = &won[0].1;
            assert_eq!(stores[1].user(&name).await.unwrap().as_ref(), Some(winner));
        }
    }

    pub async fn a_registration_can_be_repeated_and_names_are_case_sensitive(
        harness: &impl Harness,
    ) {
        let store = harness.open(deaf()).await;
        assert_eq!(store.user("anna").await.unwrap(), None);
        store.create_user(user("anna", "hash")).await.unwrap();
        store.create_user(user("anna", "hash")).await.unwrap();
        assert_eq!(
            store.create_user(user("anna", "Hash")).await,
            Err(StoreError::Exists)
        );
        store.create_user(user("Anna", "other")).await.unwrap();
        assert_eq!(
            store.user("anna").await.unwrap(),
            Some(user("anna", "hash"))
        );
        assert_eq!(
            store.user("Anna").await.unwrap(),
            Some(user("Anna", "other"))
        );
    }

    pub async fn a_hash_is_replaced_only_if_it_is_the_expected_one(harness: &impl Harness) {
        let store = harness.open(deaf()).await;
        store.create_user(user("anna", "old")).await.unwrap();
        store.replace_hash("anna", "older", "wrong").await.unwrap();
        assert_eq!(store.user("anna").await.unwrap(), Some(user("anna", "old")));
        store.replace_hash("anna", "old", "new").await.unwrap();
        store.replace_hash("anna", "old", "newer").await.unwrap();
        assert_eq!(store.user("anna").await.unwrap(), Some(user("anna", "new")));
        store.replace_hash("nobody", "old", "new").await.unwrap();
        assert_eq!(store.user("nobody").await.unwrap(), None);
    }

    pub async fn channels_come_built_in_first_then_in_order_of_creation(harness: &impl Harness) {
        let store = harness.open(deaf()).await;
        let create = async |key: &str, name: &str| {
            let channel = Channel {
                key: key.to_owned(),
                name: name.to_owned(),
            };
            store.create_channel(channel).await.unwrap();
        };
        create("zebra", "Zebra").await;
        create("apple", "Apple").await;
        create("zebra", "Other").await;
        create("random", "Not random").await;
        create("middle", "Middle").await;
        let expected = [
            ("general", "General"),
            ("programming", "Programming"),
            ("random", "Random"),
            ("zebra", "Zebra"),
            ("apple", "Apple"),
            ("middle", "Middle"),
        ];
        let list = async |store: &Arc<dyn Store>| {
            let channels = store.channels().await.unwrap();
            channels
                .into_iter()
                .map(|c| (c.key, c.name))
                .collect::<Vec<_>>()
        };
        let expected: Vec<_> = expected
            .iter()
            .map(|&(key, name)| (key.to_owned(), name.to_owned()))
            .collect();
        assert_eq!(list(&store).await, expected);
        harness.restart().await;
        assert_eq!(list(&harness.open(deaf()).await).await, expected);
    }

    pub async fn a_repeated_nonce_yields_the_first_post_and_no_second_message(
        harness: &impl Harness,
    ) {
        let (ear, sink) = Ear::new();
        let store = harness.open(sink).await;
        store.subscribe("c").await.unwrap();
        let first = store.post(message("c", "anna", "hello")).await.unwrap();

        // Whatever else is different: channel, user and nonce decide.
        let mut again = message("c", "anna", "hello");
        again.message = "another text".to_owned();
        again.sender = "another connection".to_owned();
        assert_eq!(store.post(again.clone()).await.unwrap(), first);

        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..20 {
            let store = Arc::clone(&store);
            tasks.spawn(async move { store.post(message("c", "anna", "twenty")).await.unwrap() });
        }
        let twenty = tasks.join_all().await;
        assert!(
            twenty
                .iter()
                .all(|posted| posted == &twenty[0] && posted.id == 2),
            "{twenty:?}"
        );

        assert_eq!(
            store.post(message("c", "bert", "hello")).await.unwrap().id,
            3
        );
        assert_eq!(
            store.post(message("d", "anna", "hello")).await.unwrap().id,
            1
        );

        ear.until_id("c", 3).await;
        harness.restart().await;
        let store = harness.open(deaf()).await;
        assert_eq!(store.post(again).await.unwrap(), first);
        let page = store
            .read("c", Range::Latest { start: 0, end: 100 })
            .await
            .unwrap();
        assert_eq!((ids(&page), page.last), (vec![1, 2, 3], 3));
        assert_eq!(event(&page.messages[0])["message"], "hello");
        assert_eq!(ear.ids("c"), [1, 2, 3]);
    }

    pub async fn fifty_posters_get_dense_ids_and_every_subscriber_hears_them_in_order(
        harness: &impl Harness,
    ) {
        const POSTERS: u64 = 50;
        const EACH: u64 = 20;
        let (ear_a, sink_a) = Ear::new();
        let (ear_b, sink_b) = Ear::new();
        let stores = [harness.open(sink_a).await, harness.open(sink_b).await];
        for store in &stores {
            assert_eq!(store.subscribe("c").await.unwrap(), 0);
        }
        let mut tasks = tokio::task::JoinSet::new();
        for poster in 0..POSTERS {
            let store = Arc::clone(&stores[poster as usize % 2]);
            tasks.spawn(async move {
                let mut ids = Vec::new();
                for n in 0..EACH {
                    let new = message("c", &format!("user {poster}"), &format!("text {n}"));
                    ids.push(store.post(new).await.unwrap().id);
                }
                assert!(
                    ids.is_sorted(),
                    "one poster's messages are in order: {ids:?}"
                );
                ids
            });
        }
        let mut given: Vec<u64> = tasks.join_all().await.into_iter().flatten().collect();
        given.sort_unstable();
        let dense: Vec<u64> = (1..=POSTERS * EACH).collect();
        assert_eq!(given, dense);
        for ear in [ear_a, ear_b] {
            ear.until_id("c", POSTERS * EACH).await;
            assert_eq!(ear.ids("c"), dense);
        }
    }

    pub async fn a_subscription_amid_posts_has_neither_gap_nor_overlap(harness: &impl Harness) {
        let poster = harness.open(deaf()).await;
        let posting = tokio::spawn(futures_util::future::join_all((0..4).map(|task| {
            let poster = Arc::clone(&poster);
            async move {
                for n in 0..500 {
                    post(&poster, "c", &format!("{task}, {n}")).await;
                    post(&poster, "d", &format!("{task}, {n}")).await;
                }
            }
        })));
        let mut subscribers = Vec::new();
        while !posting.is_finished() && subscribers.len() < 200 {
            let (ear, sink) = Ear::new();
            let store = harness.open(sink).await;
            let last = store.subscribe("c").await.unwrap();
            subscribers.push((ear, store, last));
        }
        posting.await.unwrap();
        let end = post(&poster, "c", "the end").await.id;
        assert!(
            subscribers
                .iter()
                .any(|(.., last)| (1..end - 1).contains(last)),
            "never amid"
        );
        for (ear, _store, last) in subscribers {
            ear.until_id("c", end).await;
            assert_eq!(
                ear.ids("c"),
                (last + 1..=end).collect::<Vec<_>>(),
                "after {last}"
            );
        }
    }

    pub async fn a_renewed_subscription_hears_each_message_once(harness: &impl Harness) {
        let (ear, sink) = Ear::new();
        let store = harness.open(sink).await;
        assert_eq!(store.subscribe("c").await.unwrap(), 0);
        post(&store, "c", "one").await;
        assert_eq!(store.subscribe("c").await.unwrap(), 1);
        post(&store, "c", "two").await;
        post(&store, "c", "three").await;
        ear.until_id("c", 3).await;
        assert_eq!(ear.ids("c"), [1, 2, 3]);
    }

    pub async fn every_range_yields_the_right_page(harness: &impl Harness) {
        let store = harness.open(deaf()).await;
        let total = u64::from(PAGE_LIMIT) * 2 + 50;
        post_many(&[Arc::clone(&store)], "c", total as usize).await;
        post_many(&[Arc::clone(&store)], "neighbour", 3).await;
        let limit = u64::from(PAGE_LIMIT);
        let max = u64::MAX;
        let (latest, before, after) = (
            |start, end| Range::Latest { start, end },
            |id, limit| Range::Before { id, limit },
            |id, limit| Range::After { id, limit },
        );
        #[allow(clippy::reversed_empty_ranges)] // it shall be empty
        let none = 1..=0;
        let cases = [
            (latest(0, 1), total..=total),
            (latest(0, 10), total - 9..=total),
            (latest(10, 30), total - 29..=total - 10),
            (latest(0, limit), total - limit + 1..=total),
            (latest(0, limit + 1), total - limit + 1..=total),
            (latest(0, max), total - limit + 1..=total),
            (latest(7, max), total - limit - 6..=total - 7),
            (latest(total - 3, total), 1..=3),
            (latest(total - 3, total + 100), 1..=3),
            (latest(total - 1, max), 1..=1),
            (latest(total, total + 5), none.clone()),
            (latest(max - 1, max), none.clone()),
            (latest(max, max), none.clone()),
            (latest(5, 5), none.clone()),
            (latest(9, 5), none.clone()),
            (latest(max, 0), none.clone()),
            (before(total + 1, 5), total - 4..=total),
            (before(10, 3), 7..=9),
            (before(10, 9), 1..=9),
            (before(10, u32::MAX), 1..=9),
            (before(max, 4), total - 3..=total),
            (before(max, u32::MAX), total - limit + 1..=total),
            (before(2, 1), 1..=1),
            (before(1, 5), none.clone()),
            (before(0, 5), none.clone()),
            (before(10, 0), none.clone()),
            (after(0, 3), 1..=3),
            (after(0, u32::MAX), 1..=limit),
            (after(10, 5), 11..=15),
            (after(total - 2, 10), total - 1..=total),
            (after(total - 1, 1), total..=total),
            (after(total, 5), none.clone()),
            (after(max, 5), none.clone()),
            (after(10, 0), none),
        ];
        for (range, expected) in cases {
            let page = store.read("c", range).await.unwrap();
            assert_eq!(ids(&page), expected.collect::<Vec<_>>(), "{range:?}");
            assert_eq!(page.last, total, "{range:?}");
        }
        for range in [latest(0, 10), before(max, 10), after(0, 10)] {
            let page = store.read("nobody posted here", range).await.unwrap();
            assert_eq!((ids(&page), page.last), (vec![], 0), "{range:?}");
        }
        // The key is taken literally.
        let page = store.read("C", latest(0, 10)).await.unwrap();
        assert_eq!((ids(&page), page.last), (vec![], 0));
    }

    pub async fn last_before_finds_the_last_message_before_a_time(harness: &impl Harness) {
        let store = harness.open(deaf()).await;
        assert_eq!(store.last_before("c", i64::MAX).await.unwrap(), 0);
        let mut dates = Vec::new();
        for n in 0..40 {
            let posted = post(&store, "c", &n.to_string()).await;
            let date: jiff::Timestamp = posted.date.parse().unwrap();
            dates.push(date.as_millisecond());
            if n % 3 == 0 {
                // Some messages shall share their date, some shall not.
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        assert!(dates.is_sorted());
        assert!(dates.last() > dates.first());
        let moments = dates.iter().flat_map(|&date| [date - 1, date, date + 1]);
        for millis in moments.chain([0, -1, i64::MIN, i64::MAX]) {
            let expected = dates.iter().filter(|&&date| date < millis).count() as u64;
            assert_eq!(
                store.last_before("c", millis).await.unwrap(),
                expected,
                "{millis}"
            );
        }
    }

    pub async fn any_text_comes_back_byte_for_byte(harness: &impl Harness) {
        let texts = [
            "👩‍👩‍👧‍👦 🏳️‍🌈 \u{1f1e9}\u{1f1ea} e\u{301}",
            "\u{202e}from right to left\u{202c} \u{feff}\u{200b}",
            "'; DROP TABLE messages; -- \" \\ \\u0041 %s {} $1 ?1 :a",
            "line\nbreak\r\n\ttab \u{1} \u{7f} \u{85} \u{2028} \u{2029}",
            "</script><!-- & &amp; -->",
            "\u{10ffff}\u{ffff}\u{e000}",
            " ",
            "before\0after",
            "",
        ];
        let long = "ß🙂".repeat(5000);
        let (ear, sink) = Ear::new();
        let store = harness.open(sink).await;
        let mut expected = Vec::new();
        for (n, text) in texts.into_iter().chain([long.as_str()]).enumerate() {
            // Every other field may hold anything as well.
            let channel = format!("channel {text}");
            let author = format!("user {text}");
            let nonce = format!("nonce {text}");
            let client_nonce = n % 2 == 0;
            store.subscribe(&channel).await.unwrap();
            let new = NewMessage {
                channel: channel.clone(),
                user: author.clone(),
                message: text.to_owned(),
                nonce: nonce.clone(),
                client_nonce,
                sender: format!("sender {text}"),
            };
            let posted = store.post(new).await.unwrap();
            assert_eq!(posted.id, 1);
            let mut body = serde_json::json!({
                "message": text,
                "user": author,
                "date": posted.date,
                "id": 1,
                "channel": channel,
            });
            if client_nonce {
                body["nonce"] = nonce.into();
            }
            store.create_user(user(&author, "hash")).await.unwrap();
            expected.push((channel, author, format!("sender {text}"), body));
        }
        harness.restart().await;
        let store = harness.open(deaf()).await;
        for (channel, author, sender, body) in expected {
            ear.until_id(&channel, 1).await;
            let page = store
                .read(&channel, Range::After { id: 0, limit: 10 })
                .await
                .unwrap();
            let [stored] = page.messages.as_slice() else {
                panic!("{page:?}")
            };
            assert_eq!(event(stored), body);
            assert_eq!((&stored.user, &stored.sender), (&author, &sender));
            let published = ear.messages(&channel).remove(0);
            assert_eq!(
                published.event.get(),
                stored.event.get(),
                "published as it is stored"
            );
            assert_eq!((published.user, published.sender), (author.clone(), sender));
            assert_eq!(
                store.user(&author).await.unwrap(),
                Some(user(&author, "hash"))
            );
        }
    }

    pub async fn dates_are_iso_8601_in_utc_with_milliseconds(harness: &impl Harness) {
        let store = harness.open(deaf()).await;
        let now = || jiff::Timestamp::now().as_millisecond();
        for n in 0..20 {
            let earliest = now();
            let date = post(&store, "c", &n.to_string()).await.date;
            let parsed: jiff::Timestamp = date.parse().unwrap();
            assert!(
                (earliest..=now()).contains(&parsed.as_millisecond()),
                "{date}"
            );
            let shape: String = date
                .chars()
                .map(|c| if c.is_ascii_digit() { '0' } else { c })
                .collect();
            assert_eq!(shape, "0000-00-00T00:00:00.000Z");
        }
    }

    pub async fn a_restart_keeps_everything(harness: &impl Harness) {
        let store = harness.open(deaf()).await;
        store.create_user(user("anna", "hash")).await.unwrap();
        let posted = post_many(&[store], "c", 100).await;
        for restart in 0..3 {
            harness.restart().await;
            let store = harness.open(deaf()).await;
            assert_eq!(
                store.user("anna").await.unwrap(),
                Some(user("anna", "hash"))
            );
            let page = store
                .read("c", Range::After { id: 0, limit: 100 })
                .await
                .unwrap();
            assert_eq!(page.messages.len(), 100);
            for message in &page.messages {
                let (text, posted) = &posted[&message.id];
                assert_eq!(event(message)["message"], *text);
                assert_eq!(event(message)["date"], posted.date);
            }
            assert_eq!(store.subscribe("c").await.unwrap(), 100 + restart);
            assert_eq!(
                post(&store, "c", &format!("after {restart}")).await.id,
                101 + restart
            );
        }
    }

    pub async fn an_unsubscribed_channel_is_not_heard_any_more(harness: &impl Harness) {
        let (ear, sink) = Ear::new();
        let store = harness.open(sink).await;
        let other = harness.open(deaf()).await;
        store.subscribe("c").await.unwrap();
        store.subscribe("d").await.unwrap();
        post(&other, "c", "heard").await;
        ear.until_id("c", 1).await;
        store.unsubscribe("c").await.unwrap();
        store.unsubscribe("c").await.unwrap();
        post(&other, "c", "not heard").await;
        other.typing("c", "bert").await.unwrap();
        other.typing("d", "anna").await.unwrap();
        post(&other, "d", "heard").await;
        ear.until_id("d", 1).await;
        ear.until("anna", |ear| !ear.typing().is_empty()).await;
        assert_eq!(ear.ids("c"), [1]);
        assert_eq!(ear.typing(), [("d".to_owned(), "anna".to_owned())]);
        assert_eq!(store.subscribe("c").await.unwrap(), 2);
        post(&other, "c", "heard again").await;
        ear.until_id("c", 3).await;
        assert_eq!(ear.ids("c"), [1, 3]);
    }

    pub async fn a_dropped_store_hears_nothing_any_more(harness: &impl Harness) {
        let (dropped_ear, dropped_sink) = Ear::new();
        let (ear, sink) = Ear::new();
        let dropped = harness.open(dropped_sink).await;
        let store = harness.open(sink).await;
        for channel in ["c", "d"] {
            dropped.subscribe(channel).await.unwrap();
            store.subscribe(channel).await.unwrap();
            post(&store, channel, "one").await;
            dropped_ear.until_id(channel, 1).await;
        }
        drop(dropped);
        for channel in ["c", "d"] {
            post(&store, channel, "two").await;
            ear.until_id(channel, 2).await;
        }
        assert_eq!(dropped_ear.ids("c"), [1]);
        assert_eq!(dropped_ear.ids("d"), [1]);
    }

    pub async fn a_sink_that_refuses_loses_all_its_subscriptions(harness: &impl Harness) {
        let (refusing_ear, sink) = Ear::accepting(
            |event| !matches!(event, BusEvent::Message { message, .. } if message.id == 2),
        );
        let (ear, other_sink) = Ear::new();
        let refusing = harness.open(sink).await;
        let store = harness.open(other_sink).await;
        for channel in ["c", "d"] {
            refusing.subscribe(channel).await.unwrap();
            store.subscribe(channel).await.unwrap();
        }
        for text in ["one", "two", "three"] {
            post(&store, "c", text).await;
        }
        post(&store, "d", "one").await;
        ear.until_id("c", 3).await;
        ear.until_id("d", 1).await;
        refusing_ear.until_id("c", 2).await;
        // It can begin anew.
        assert_eq!(refusing.subscribe("d").await.unwrap(), 1);
        post(&store, "d", "two").await;
        refusing_ear.until_id("d", 2).await;
        assert_eq!(refusing_ear.ids("c"), [1, 2]);
        assert_eq!(refusing_ear.ids("d"), [2]);
    }

    pub async fn typing_reaches_the_subscribers_of_that_channel(harness: &impl Harness) {
        let (ear_a, sink_a) = Ear::new();
        let (ear_b, sink_b) = Ear::new();
        let a = harness.open(sink_a).await;
        let b = harness.open(sink_b).await;
        a.subscribe("c").await.unwrap();
        b.subscribe("c").await.unwrap();
        b.subscribe("d").await.unwrap();
        a.typing("c", "anna").await.unwrap();
        a.typing("d", "anna").await.unwrap();
        a.typing("nobody is here", "anna").await.unwrap();
        let on = |channel: &str| (channel.to_owned(), "anna".to_owned());
        ear_a
            .until("anna typing on c", |ear| ear.typing() == [on("c")])
            .await;
        ear_b
            .until("anna typing on both", |ear| {
                ear.typing() == [on("c"), on("d")]
            })
            .await;
        let page = a
            .read("c", Range::Latest { start: 0, end: 10 })
            .await
            .unwrap();
        assert_eq!((ids(&page), page.last), (vec![], 0), "it is not stored");
    }

    pub async fn an_import_keeps_everything_about_the_messages(harness: &impl Harness) {
        let store = harness.open_to_import().await;
        assert_eq!(store.import("c", 1, Vec::new()).await, Ok(0));
        assert_eq!(store.import("c", 1, batch(1..=1000)).await, Ok(1000));
        assert_eq!(store.import("c", 1001, batch(1001..=1234)).await, Ok(1234));
        assert_eq!(store.import("d", 1, batch(5..=5)).await, Ok(1));

        harness.restart().await;
        let store = harness.open(deaf()).await;
        let c = all(&store, "c").await;
        assert_eq!(c.len(), 1234);
        for (n, (id, user, text, date)) in (1..).zip(&c) {
            let Imported {
                user: author,
                message,
                millis,
            } = batch(n..=n).remove(0);
            let millis = jiff::Timestamp::from_millisecond(millis).unwrap();
            assert_eq!((*id, user, text), (n, &author, &message));
            assert_eq!(*date, format!("{millis:.3}"));
        }
        assert_eq!(all(&store, "d").await[0].2, "imported \"5\"");

        // Positions count from the newest.
        let page = store.read("c", Range::Latest { start: 0, end: 25 });
        assert_eq!(ids(&page.await.unwrap()), (1210..=1234).collect::<Vec<_>>());
        let page = store.read("c", Range::Latest { start: 25, end: 50 });
        assert_eq!(ids(&page.await.unwrap()), (1185..=1209).collect::<Vec<_>>());
        assert_eq!(store.last_before("c", 500_001).await, Ok(500));
    }

    pub async fn an_import_can_be_repeated_and_resumed_anywhere(harness: &impl Harness) {
        let store = harness.open_to_import().await;
        assert_eq!(store.import("c", 1, batch(1..=10)).await, Ok(10));
        assert_eq!(store.import("c", 1, batch(1..=10)).await, Ok(10));
        assert_eq!(store.import("c", 4, batch(4..=9)).await, Ok(10));
        harness.restart().await;
        let store = harness.open_to_import().await;
        assert_eq!(store.import("c", 1, Vec::new()).await, Ok(10));
        // Half of it is there.
        assert_eq!(store.import("c", 6, batch(6..=15)).await, Ok(15));
        // Whatever such a batch holds, what is there stays.
        assert_eq!(store.import("c", 15, batch(99..=100)).await, Ok(16));
        let store: Arc<dyn Store> = store;
        let texts = all(&store, "c")
            .await
            .into_iter()
            .map(|(_, _, text, _)| text);
        let expected = (1..=15).chain([100]).map(|n| format!("imported \"{n}\""));
        assert!(texts.eq(expected));
    }

    pub async fn of_two_imports_at_once_every_message_comes_once(harness: &impl Harness) {
        let stores = [
            harness.open_to_import().await,
            harness.open_to_import().await,
        ];
        let mut tasks = tokio::task::JoinSet::new();
        for store in stores {
            tasks.spawn(async move {
                for n in 0..20 {
                    let first = n * 10 + 1;
                    let imported = store.import("c", first, batch(first..=first + 9)).await;
                    assert!(imported.unwrap() >= first + 9);
                }
            });
        }
        tasks.join_all().await;
        let store = harness.open(deaf()).await;
        let texts = all(&store, "c")
            .await
            .into_iter()
            .map(|(_, _, text, _)| text);
        assert!(texts.eq((1..=200).map(|n| format!("imported \"{n}\""))));
    }

    pub async fn an_import_that_begins_too_late_is_refused(harness: &impl Harness) {
        let store = harness.open_to_import().await;
        let gap = |first, imported| Err(ImportError::Gap { first, imported });
        assert_eq!(store.import("c", 2, batch(2..=3)).await, gap(2, 0));
        assert_eq!(store.import("c", 1, batch(1..=2)).await, Ok(2));
        assert_eq!(store.import("c", 4, batch(4..=5)).await, gap(4, 2));
        assert_eq!(store.import("c", 0, batch(1..=2)).await, gap(0, 2));
        let store: Arc<dyn Store> = store;
        assert_eq!(all(&store, "c").await.len(), 2);
    }

    pub async fn a_channel_with_messages_of_its_own_takes_no_others(harness: &impl Harness) {
        let import = harness.open_to_import().await;
        let store: Arc<dyn Store> = import.clone();
        let native = |last, imported| Err(ImportError::Native { last, imported });
        post(&store, "native", "one").await;
        assert_eq!(import.import("native", 1, batch(1..=1)).await, native(1, 0));

        assert_eq!(import.import("c", 1, batch(1..=3)).await, Ok(3));
        // What is posted goes on from there.
        assert_eq!(post(&store, "c", "four").await.id, 4);
        assert_eq!(import.import("c", 1, batch(1..=3)).await, Ok(3));
        assert_eq!(import.import("c", 3, batch(3..=4)).await, native(4, 3));
        harness.restart().await;
        let import = harness.open_to_import().await;
        assert_eq!(import.import("c", 4, batch(4..=5)).await, native(4, 3));
        let store: Arc<dyn Store> = import;
        assert_eq!(post(&store, "c", "five").await.id, 5);
        let texts: Vec<_> = all(&store, "c").await.into_iter().map(|m| m.2).collect();
        assert_eq!(texts[2..], ["imported \"3\"", "four", "five"]);
        assert_eq!(all(&store, "native").await.len(), 1);
    }

    pub async fn dates_never_go_back_whatever_is_imported(harness: &impl Harness) {
        let store = harness.open_to_import().await;
        let mut messages = batch(1..=4);
        messages[1].millis = 10;
        assert_eq!(store.import("c", 1, messages).await, Ok(4));
        assert_eq!(store.import("c", 5, batch(1..=1)).await, Ok(5));
        let store: Arc<dyn Store> = store;
        post(&store, "c", "now").await;
        let dates: Vec<_> = all(&store, "c").await.into_iter().map(|m| m.3).collect();
        let seconds = [1, 1, 3, 4, 4].map(|n| format!("1970-01-01T00:00:0{n}.000Z"));
        assert_eq!(dates[..5], seconds);
        assert!(dates[5].as_str() > "2026");
    }

    pub async fn an_import_is_not_published(harness: &impl Harness) {
        let (ear, sink) = Ear::new();
        let store = harness.open(sink).await;
        let import = harness.open_to_import().await;
        assert_eq!(store.subscribe("c").await, Ok(0));
        assert_eq!(import.import("c", 1, batch(1..=3)).await, Ok(3));
        post(&store, "c", "four").await;
        ear.until_id("c", 4).await;
        assert_eq!(ear.ids("c"), [4]);
    }
}

/// Makes a test of each item of the suite, on a new harness.
macro_rules! run_suite {
    ($harness:expr; $($test:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                super::suite::$test(&$harness).await;
            }
        )*
    };
    ($harness:expr) => {
        run_suite! { $harness;
            of_two_registrations_at_once_one_wins
            a_registration_can_be_repeated_and_names_are_case_sensitive
            a_hash_is_replaced_only_if_it_is_the_expected_one
            channels_come_built_in_first_then_in_order_of_creation
            a_repeated_nonce_yields_the_first_post_and_no_second_message
            fifty_posters_get_dense_ids_and_every_subscriber_hears_them_in_order
            a_subscription_amid_posts_has_neither_gap_nor_overlap
            a_renewed_subscription_hears_each_message_once
            every_range_yields_the_right_page
            last_before_finds_the_last_message_before_a_time
            any_text_comes_back_byte_for_byte
            dates_are_iso_8601_in_utc_with_milliseconds
            a_restart_keeps_everything
            an_unsubscribed_channel_is_not_heard_any_more
            a_dropped_store_hears_nothing_any_more
            a_sink_that_refuses_loses_all_its_subscriptions
            typing_reaches_the_subscribers_of_that_channel
            an_import_keeps_everything_about_the_messages
            an_import_can_be_repeated_and_resumed_anywhere
            of_two_imports_at_once_every_message_comes_once
            an_import_that_begins_too_late_is_refused
            a_channel_with_messages_of_its_own_takes_no_others
            dates_never_go_back_whatever_is_imported
            an_import_is_not_published
        }
    };
}

#[path = "store/in_redis.rs"]
mod in_redis;

mod embedded {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::fs::PermissionsExt;
    use std::path::{Path, PathBuf};
    use std::process::{Child, Command, Stdio};
    use std::time::Instant;

    use banter::store::embedded::{Embedded, OpenError};
    use tempfile::TempDir;

    use super::*;

    run_suite!(EmbeddedHarness::new());

    struct EmbeddedHarness {
        directory: TempDir,
        store: tokio::sync::Mutex<Arc<Embedded>>,
    }

    impl EmbeddedHarness {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let store = Embedded::open(&directory.path().join("banter.db")).unwrap();
            Self {
                directory,
                store: tokio::sync::Mutex::new(store),
            }
        }
    }

    impl Harness for EmbeddedHarness {
        async fn open(&self, sink: BusSink) -> Arc<dyn Store> {
            Arc::new(self.store.lock().await.client(sink))
        }

        async fn open_to_import(&self) -> Arc<dyn Import> {
            Arc::new(self.store.lock().await.client(deaf()))
        }

        async fn restart(&self) {
            let mut store = self.store.lock().await;
            store.shutdown().await;
            *store = Embedded::open(&self.directory.path().join("banter.db")).unwrap();
        }
    }

    /// A directory and the path of a database in it.
    fn place() -> (TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state").join("banter.db");
        (directory, path)
    }

    /// Has the error for an operator name the path on one line; returns that line.
    fn refusal(path: &Path) -> String {
        let line = match Embedded::open(path) {
            Ok(_) => panic!("{} was opened", path.display()),
            Err(error) => error.to_string(),
        };
        assert!(line.starts_with(&format!("{}: ", path.display())), "{line}");
        assert!(!line.contains('\n') && line.contains("; "), "{line}");
        line
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn many_posts_share_a_commit() {
        let (_directory, path) = place();
        let store = Embedded::open(&path).unwrap();
        let client: Arc<dyn Store> = Arc::new(store.client(deaf()));
        let before = store.commits();
        assert_eq!(post_many(&[Arc::clone(&client)], "c", 500).await.len(), 500);
        let commits = store.commits() - before;
        assert!((1..=100).contains(&commits), "{commits} commits");
        // Those that follow one another cannot share.
        for n in 0..5 {
            post(&client, "d", &n.to_string()).await;
        }
        assert_eq!(store.commits() - before - commits, 5);
    }

    #[tokio::test]
    async fn typing_writes_nothing() {
        let (_directory, path) = place();
        let store = Embedded::open(&path).unwrap();
        let (ear, sink) = Ear::new();
        let client = store.client(sink);
        client.subscribe("c").await.unwrap();
        for _ in 0..100 {
            client.typing("c", "anna").await.unwrap();
        }
        assert_eq!((ear.typing().len(), store.commits()), (100, 0));
    }

    #[tokio::test]
    async fn a_full_queue_refuses_at_once_and_recovers() {
        let (_directory, path) = place();
        let store = Embedded::open(&path).unwrap();
        // The sink holds the writer up until `go` is dropped.
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let wait = Mutex::new(wait);
        let client: Arc<dyn Store> = Arc::new(store.client(Arc::new(move |_| {
            let _ = wait.lock().recv();
            true
        })));
        client.subscribe("c").await.unwrap();
        let posts = (0..6000).map(|n| {
            let client = Arc::clone(&client);
            async move { client.post(message("c", "anna", &n.to_string())).await }
        });
        // All are polled once, on this thread, before any is answered.
        let mut posts = Box::pin(futures_util::future::join_all(posts));
        assert!(futures_util::poll!(posts.as_mut()).is_pending());
        drop(go);
        let results = posts.await;
        let full = StoreError::Unavailable("too many writes are waiting".to_owned());
        let refused = results
            .iter()
            .filter(|result| **result == Err(full.clone()))
            .count();
        let mut ids: Vec<u64> = results.iter().flatten().map(|posted| posted.id).collect();
        assert!(refused > 1000, "{refused}");
        assert_eq!(ids.len() + refused, results.len());
        ids.sort_unstable();
        assert_eq!(ids, (1..=ids.len() as u64).collect::<Vec<_>>());
        assert_eq!(
            post(&client, "c", "one more").await.id,
            ids.len() as u64 + 1
        );
    }

    #[tokio::test]
    async fn an_error_tells_clients_nothing_of_the_database() {
        let (_directory, path) = place();
        let store = Embedded::open(&path).unwrap();
        let client: Arc<dyn Store> = Arc::new(store.client(deaf()));
        post(&client, "c", "one").await;
        let elsewhere = rusqlite::Connection::open(&path).unwrap();
        elsewhere
            .execute_batch("ALTER TABLE messages RENAME TO hidden")
            .unwrap();
        let expected = StoreError::Unavailable("the database failed".to_owned());
        assert_eq!(
            client.post(message("c", "anna", "two")).await.unwrap_err(),
            expected
        );
        let read = client.read("c", Range::After { id: 0, limit: 5 }).await;
        assert_eq!(read.unwrap_err(), expected);
        elsewhere
            .execute_batch("ALTER TABLE hidden RENAME TO messages")
            .unwrap();
        assert_eq!(post(&client, "c", "two").await.id, 2);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_shutdown_finishes_what_is_queued_and_empties_the_log() {
        let (_directory, path) = place();
        let store = Embedded::open(&path).unwrap();
        let client: Arc<dyn Store> = Arc::new(store.client(deaf()));
        let posts = (0..300).map(|n| {
            let client = Arc::clone(&client);
            async move {
                client
                    .post(message("c", "anna", &n.to_string()))
                    .await
                    .unwrap()
            }
        });
        // One poll queues all of them.
        let mut posts = Box::pin(futures_util::future::join_all(posts));
        assert!(futures_util::poll!(posts.as_mut()).is_pending());
        tokio::join!(store.shutdown(), store.shutdown());
        assert_eq!(posts.await.len(), 300);
        let closing = StoreError::Unavailable("it is shutting down".to_owned());
        assert_eq!(client.channels().await.unwrap_err(), closing);
        assert_eq!(client.subscribe("c").await.unwrap_err(), closing);
        assert!(!path.with_file_name("banter.db-wal").exists());

        let again = Embedded::open(&path).unwrap();
        assert_eq!(again.client(deaf()).subscribe("c").await.unwrap(), 300);
    }

    #[tokio::test]
    async fn dropping_the_last_reference_closes_it() {
        let (_directory, path) = place();
        let client: Arc<dyn Store> = Arc::new(Embedded::open(&path).unwrap().client(deaf()));
        post(&client, "c", "a client keeps it open").await;
        drop(client);
        assert!(!path.with_file_name("banter.db-wal").exists());
        let client: Arc<dyn Store> = Arc::new(Embedded::open(&path).unwrap().client(deaf()));
        assert_eq!(post(&client, "c", "two").await.id, 2);
    }

    #[tokio::test]
    async fn only_its_owner_may_look_at_the_files() {
        let (_directory, path) = place();
        let store = Embedded::open(&path).unwrap();
        let client: Arc<dyn Store> = Arc::new(store.client(deaf()));
        post(&client, "c", "one").await;
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        let mut seen = 0;
        for entry in path.parent().unwrap().read_dir().unwrap() {
            let file = entry.unwrap().path();
            assert_eq!(mode(&file), 0o600, "{}", file.display());
            seen += 1;
        }
        assert_eq!(seen, 4, "database, log, its index and lock");

        store.shutdown().await;
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        let _store = Embedded::open(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn a_second_owner_is_refused_and_told_who_is_the_first() {
        let (_directory, path) = place();
        let first = Embedded::open(&path).unwrap();
        let line = refusal(&path);
        assert!(
            line.contains(&format!("process {}", std::process::id())),
            "{line}"
        );
        assert!(line.contains("stop that one first"), "{line}");
        drop(first);
        Embedded::open(&path).unwrap();
    }

    #[test]
    fn a_predecessor_that_is_just_going_is_waited_for() {
        let (_directory, path) = place();
        let first = Embedded::open(&path).unwrap();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| Embedded::open(&path));
            // However these two are timed, the second must succeed.
            std::thread::sleep(Duration::from_millis(50));
            drop(first);
            second.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_file_that_cannot_be_used_is_refused_with_what_to_do() {
        let (directory, path) = place();
        Embedded::open(&path).unwrap();

        let newer = directory.path().join("newer.db");
        std::fs::copy(&path, &newer).unwrap();
        let connection = rusqlite::Connection::open(&newer).unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        drop(connection);
        let line = refusal(&newer);
        assert!(
            line.contains("schema version 99") && line.contains("newer server"),
            "{line}"
        );

        let foreign = directory.path().join("foreign.db");
        let connection = rusqlite::Connection::open(&foreign).unwrap();
        connection
            .execute_batch("CREATE TABLE recipes (name)")
            .unwrap();
        drop(connection);
        let bytes = std::fs::read(&foreign).unwrap();
        assert!(refusal(&foreign).contains("another program's"));
        assert_eq!(std::fs::read(&foreign).unwrap(), bytes, "it is left alone");

        let text = directory.path().join("text.db");
        std::fs::write(&text, "This is no database. ".repeat(100)).unwrap();
        assert!(refusal(&text).contains("restore it from a backup"));

        let damaged = directory.path().join("damaged.db");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[100..4096].fill(0xaa);
        std::fs::write(&damaged, bytes).unwrap();
        assert!(refusal(&damaged).contains("restore it from a backup"));

        let below_a_file = path.join("banter.db");
        assert!(refusal(&below_a_file).contains("cannot create the directory"));

        let a_directory = directory.path().join("directory.db");
        std::fs::create_dir(&a_directory).unwrap();
        assert!(refusal(&a_directory).contains("for writing"));
    }

    #[tokio::test]
    async fn a_database_from_before_imports_is_brought_up_to_date() {
        let (_directory, path) = place();
        let store = Embedded::open(&path).unwrap();
        let client: Arc<dyn Store> = Arc::new(store.client(deaf()));
        post(&client, "c", "one").await;
        store.shutdown().await;
        // As it was then.
        rusqlite::Connection::open(&path)
            .unwrap()
            .execute_batch("ALTER TABLE counters DROP COLUMN imported; PRAGMA user_version = 1;")
            .unwrap();
        let client = Embedded::open(&path).unwrap().client(deaf());
        let (last, imported) = (1, 0);
        let native = Err(ImportError::Native { last, imported });
        assert_eq!(client.import("c", 1, batch(1..=1)).await, native);
        assert_eq!(client.import("d", 1, batch(1..=2)).await, Ok(2));
        let client: Arc<dyn Store> = Arc::new(client);
        assert_eq!(post(&client, "c", "two").await.id, 2);
    }

    #[test]
    fn a_database_that_another_program_holds_is_refused_with_what_to_do() {
        let (_directory, path) = place();
        drop(Embedded::open(&path).unwrap());
        let shell = rusqlite::Connection::open(&path).unwrap();
        shell
            .execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE")
            .unwrap();
        let line = refusal(&path);
        assert!(line.contains("close it"), "{line}");
        assert!(matches!(
            Embedded::open(&path),
            Err(OpenError::Locked { .. })
        ));
    }

    /// The variable that tells [`posts_until_killed`] its database.
    const CRASH_DATABASE: &str = "BANTER_TEST_CRASH_DATABASE";

    /// Not a test but the process that one kills: it posts for ever, from several tasks, and
    /// prints id and text of each message that was acknowledged.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    #[ignore = "run by what_was_acknowledged_survives_a_kill"]
    async fn posts_until_killed() {
        let path = std::env::var_os(CRASH_DATABASE).expect("the database's path");
        let store = Embedded::open(Path::new(&path)).unwrap();
        let run = std::process::id();
        let posters = (0..8).map(|poster| {
            let client = store.client(deaf());
            tokio::spawn(async move {
                for n in 0.. {
                    let text = format!("run {run} poster {poster} message {n}");
                    let posted = client.post(message("c", "anna", &text)).await.unwrap();
                    // Ends if nobody reads it any more.
                    let line = format!("acknowledged {} {text}\n", posted.id);
                    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
                }
            })
        });
        for poster in posters.collect::<Vec<_>>() {
            poster.await.unwrap();
        }
    }

    /// Kills the process it holds, if a test fails half-way.
    struct Killed(Child);

    impl Killed {
        fn kill(&mut self) {
            // SIGKILL; it may have died by itself, which the test then notices.
            let _ = self.0.kill();
            self.0.wait().unwrap();
        }
    }

    impl Drop for Killed {
        fn drop(&mut self) {
            self.kill();
        }
    }

    #[tokio::test]
    async fn what_was_acknowledged_survives_a_kill() {
        let (_directory, path) = place();
        let mut acknowledged = BTreeMap::new();
        for round in 0..5 {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "embedded::posts_until_killed",
                    "--ignored",
                    "--nocapture",
                ])
                .env(CRASH_DATABASE, &path)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let mut child = Killed(child);

            let mut new = 0;
            let kill_after = rand::random_range(1..400);
            let started = Instant::now();
            while let Some(Ok(line)) = lines.next() {
                // What it had printed before it died counts as well.
                if let Some(line) = line.strip_prefix("acknowledged ") {
                    let (id, text) = line.split_once(' ').unwrap();
                    let id: u64 = id.parse().unwrap();
                    assert_eq!(
                        acknowledged.insert(id, text.to_owned()),
                        None,
                        "id {id} twice"
                    );
                    new += 1;
                }
                if new == kill_after {
                    std::thread::sleep(Duration::from_micros(rand::random_range(0..3000)));
                    child.kill();
                }
                assert!(
                    started.elapsed() < DEADLINE,
                    "round {round}: only {new} posts"
                );
            }
            child.kill();
            assert!(
                new >= kill_after,
                "round {round}: it ended by itself after {new} posts"
            );

            let store = Embedded::open(&path).unwrap();
            let client = store.client(deaf());
            let mut stored = BTreeMap::new();
            loop {
                let id = stored.last_key_value().map_or(0, |(id, _)| *id);
                let page = client
                    .read("c", Range::After { id, limit: 200 })
                    .await
                    .unwrap();
                if page.messages.is_empty() {
                    assert_eq!(page.last, id);
                    break;
                }
                for message in page.messages {
                    let text = event(&message)["message"].as_str().unwrap().to_owned();
                    stored.insert(message.id, text);
                }
            }
            assert!(
                stored.keys().copied().eq(1..=stored.len() as u64),
                "ids are not dense"
            );
            for (id, text) in &acknowledged {
                assert_eq!(stored.get(id), Some(text), "round {round}: message {id}");
            }
            store.shutdown().await;
        }
    }
}
