//! The Lua scripts: each is one atomic step in Redis. What they take and return is said in them.
//!
//! They are called by hash; [`redis::Script`] sends the text again when Redis does not know it,
//! as after a restart.

use std::sync::LazyLock;

use redis::Script;

macro_rules! scripts {
    ($($(#[$doc:meta])* $name:ident = $($file:literal)+;)*) => {
        $(
            $(#[$doc])*
            pub(super) static $name: LazyLock<Script> = LazyLock::new(|| {
                Script::new(concat!($(include_str!(concat!("scripts/", $file, ".lua"))),+))
            });
        )*
    };
}

scripts! {
    /// Creates a user, unless there is one.
    CREATE_USER = "create_user";
    /// Replaces a password hash, if it is the expected one.
    REPLACE_HASH = "replace_hash";
    /// Adds a channel to the list, unless it is on it.
    CREATE_CHANNEL = "create_channel";
    /// Stores a message and publishes it, once.
    POST = "ids" "post";
    /// Appends messages of another server.
    IMPORT = "ids" "import";
    /// Reads a page of messages.
    READ = "ids" "read";
    /// Finds the last message before a time.
    LAST_BEFORE = "ids" "last_before";
    /// Names the life that Redis leads, and sees to its ids.
    LIFE = "life";
    /// Takes or renews the lease of the master.
    LEASE = "lease";
    /// Gives the lease back.
    RELEASE = "release";
}
