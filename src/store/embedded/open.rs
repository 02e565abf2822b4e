//! Opening the database: the lock, the connections, the schema.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};

/// How long a predecessor's lock is waited for. One that was killed gives it up with its last
/// breath, which may come after its successor's first.
const LOCK_WAIT: Duration = Duration::from_secs(1);

/// How long a connection waits for another program that looks into the database.
const BUSY_WAIT: Duration = Duration::from_secs(2);

/// What the write-ahead log is cut back to after a peak.
const LOG_SIZE: i64 = 64 << 20;

/// Marks a database as Banter's ("Bntr").
const APPLICATION_ID: i32 = 0x426e_7472;

/// Each step brings the schema from the version that is its index to the next one. Released steps
/// are never changed, only added to.
const STEPS: [&str; 2] = [
    // 1
    "CREATE TABLE users (
         name TEXT PRIMARY KEY,
         password_hash TEXT NOT NULL
     ) STRICT, WITHOUT ROWID;

     -- The public list, in the order of its numbers; the built-in channels have no rows.
     CREATE TABLE channels (
         number INTEGER PRIMARY KEY,
         key TEXT NOT NULL UNIQUE,
         name TEXT NOT NULL
     ) STRICT;

     -- One row for each channel that has been posted to. `last` is apart from the messages, so
     -- that their ids go on even if the newest ones are removed. Dates are Unix time in ms.
     CREATE TABLE counters (
         number INTEGER PRIMARY KEY,
         channel TEXT NOT NULL UNIQUE,
         last INTEGER NOT NULL,
         date INTEGER NOT NULL
     ) STRICT;

     CREATE TABLE messages (
         channel INTEGER NOT NULL REFERENCES counters (number),
         id INTEGER NOT NULL,
         date INTEGER NOT NULL,
         user TEXT NOT NULL,
         sender TEXT NOT NULL,
         event TEXT NOT NULL,
         PRIMARY KEY (channel, id)
     ) STRICT, WITHOUT ROWID;

     -- What a repeated post is answered with until the time `forget`.
     CREATE TABLE nonces (
         channel INTEGER NOT NULL REFERENCES counters (number),
         user TEXT NOT NULL,
         nonce TEXT NOT NULL,
         id INTEGER NOT NULL,
         date INTEGER NOT NULL,
         forget INTEGER NOT NULL,
         PRIMARY KEY (channel, user, nonce)
     ) STRICT, WITHOUT ROWID;
     CREATE INDEX nonces_by_forget ON nonces (forget);",
    // 2
    "-- How many of the channel's messages, from id 1 on, came from another server.
     ALTER TABLE counters ADD COLUMN imported INTEGER NOT NULL DEFAULT 0;",
];

/// Why the database could not be opened. Each is one line that names the path.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory is missing and cannot be created.
    #[error(
        "{path}: cannot create the directory {directory}: {source}; create it, owned by the user \
         that runs the server, or choose another state directory",
        path = path.display(), directory = directory.display()
    )]
    Directory {
        /// The database.
        path: PathBuf,
        /// Its directory.
        directory: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The database or the lock beside it cannot be opened or created.
    #[error(
        "{path}: cannot open {file} for writing: {source}; make it and its directory writable for \
         the user that runs the server",
        path = path.display(), file = file.display()
    )]
    Unwritable {
        /// The database.
        path: PathBuf,
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process owns it.
    #[error(
        "{path}: another server uses this database ({holder}); stop that one first, or give this \
         one a state directory of its own",
        path = path.display()
    )]
    InUse {
        /// The database.
        path: PathBuf,
        /// Who, as far as can be told: `process 123`.
        holder: String,
    },
    /// Another program keeps it locked.
    #[error(
        "{path}: another program has locked this database; close it (a sqlite3 shell, a backup), \
         then start again",
        path = path.display()
    )]
    Locked {
        /// The database.
        path: PathBuf,
    },
    /// A newer version of the server has written it.
    #[error(
        "{path}: has schema version {found}, this server knows versions up to {known}; run the \
         newer server, or restore a backup from before the upgrade",
        path = path.display()
    )]
    Newer {
        /// The database.
        path: PathBuf,
        /// The version it has.
        found: usize,
        /// The newest version that is known.
        known: usize,
    },
    /// It is a database, but some other program's.
    #[error(
        "{path}: is another program's SQLite database; choose another state directory",
        path = path.display()
    )]
    Foreign {
        /// The database.
        path: PathBuf,
    },
    /// It is damaged, or no database at all.
    #[error(
        "{path}: is damaged or not a database ({detail}); restore it from a backup, or move it and \
         its -wal and -shm files away to start with an empty one",
        path = path.display()
    )]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What SQLite said.
        detail: String,
    },
    /// The file system cannot hold a write-ahead log.
    #[error(
        "{path}: its file system does not support SQLite's write-ahead log (journal mode {mode}); \
         put the state directory on a local file system",
        path = path.display()
    )]
    NoLog {
        /// The database.
        path: PathBuf,
        /// The mode that SQLite fell back to.
        mode: String,
    },
    /// Anything else, such as a full disk.
    #[error(
        "{path}: cannot be opened ({detail}); check the disk's space and health",
        path = path.display()
    )]
    Failed {
        /// The database.
        path: PathBuf,
        /// What SQLite said.
        detail: String,
    },
    /// The system has no threads left.
    #[error(
        "{path}: cannot start a thread for it: {source}; raise the limit on tasks",
        path = path.display()
    )]
    Thread {
        /// The database.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl OpenError {
    /// Sorts an error of SQLite by what is to be done about it.
    fn from_sqlite(path: &Path, error: &rusqlite::Error) -> Self {
        let path = path.to_owned();
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Locked { path },
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::Damaged {
                path,
                detail: error.to_string(),
            },
            Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
                let source = io::Error::new(io::ErrorKind::PermissionDenied, error.to_string());
                Self::Unwritable {
                    file: path.clone(),
                    path,
                    source,
                }
            }
            _ => Self::Failed {
                path,
                detail: error.to_string(),
            },
        }
    }
}

/// A database that is ready for use.
pub(super) struct Database {
    /// The only connection that writes.
    pub(super) writer: Connection,
    /// Connections that cannot write.
    pub(super) readers: Vec<Connection>,
    /// To be given up after the connections.
    pub(super) lock: Lock,
}

impl Database {
    /// Opens the database at `path` with so many connections to read with.
    pub(super) fn open(path: &Path, readers: usize) -> Result<Self, OpenError> {
        // Absolute, because SQLite gives some relative names (":memory:") a meaning.
        let path = &std::path::absolute(path).map_err(|source| unwritable(path, path, source))?;
        create_directory(path)?;
        let lock = Lock::acquire(path)?;
        create_file(path)?;

        let sqlite = |error: rusqlite::Error| OpenError::from_sqlite(path, &error);
        let mut writer = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE).map_err(sqlite)?;
        // Before anything is written: the file may be somebody else's.
        let version = identify(path, &writer)?;
        let mode: String = writer
            .pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))
            .map_err(sqlite)?;
        if mode != "wal" {
            return Err(OpenError::NoLog {
                path: path.clone(),
                mode,
            });
        }
        prepare_for_writing(&writer).map_err(sqlite)?;
        migrate(&mut writer, version).map_err(sqlite)?;

        let readers = (0..readers)
            .map(|_| connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(sqlite))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            writer,
            readers,
            lock,
        })
    }
}

/// Empties the write-ahead log into the database, and closes it. For the last connection.
pub(super) fn close(connection: Connection) {
    // Nothing is lost if this fails: the log is read again at the next start.
    if let Err(error) = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())) {
        tracing::warn!("the database's write-ahead log could not be emptied: {error}");
    }
    if let Err((_, error)) = connection.close() {
        tracing::warn!("the database could not be closed cleanly: {error}");
    }
}

fn unwritable(path: &Path, file: &Path, source: io::Error) -> OpenError {
    OpenError::Unwritable {
        path: path.to_owned(),
        file: file.to_owned(),
        source,
    }
}

fn create_directory(path: &Path) -> Result<(), OpenError> {
    let Some(directory) = path.parent().filter(|directory| !directory.is_dir()) else {
        return Ok(());
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|source| OpenError::Directory {
            path: path.to_owned(),
            directory: directory.to_owned(),
            source,
        })?;
    // Lest a power failure take the directory along, with all that has been acknowledged since.
    directory
        .parent()
        .map_or(Ok(()), sync_directory)
        .map_err(|source| OpenError::Directory {
            path: path.to_owned(),
            directory: directory.to_owned(),
            source,
        })
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Creates the database as an empty file, which SQLite takes for an empty database, because only
/// so its mode can be chosen. SQLite gives its log the same mode.
fn create_file(path: &Path) -> Result<(), OpenError> {
    let failed = |source| unwritable(path, path, source);
    let file = open_private(path).map_err(failed)?;
    let permissions = file.metadata().map_err(failed)?.permissions();
    if permissions.mode() & 0o077 != 0 {
        // It holds password hashes. Not fatal, as somebody else may own the file.
        if let Err(error) = fs::set_permissions(path, fs::Permissions::from_mode(0o600)) {
            tracing::warn!(path = %path.display(), "others can read the database: {error}");
        }
    }
    path.parent().map_or(Ok(()), sync_directory).map_err(failed)
}

fn open_private(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

/// Keeps other processes away from the database: a lock on a file beside it, which the kernel
/// gives up when the process ends, however it ends. The file stays, for to remove it would let
/// two processes lock two files of the same name.
pub(super) struct Lock(File);

impl Lock {
    fn acquire(path: &Path) -> Result<Self, OpenError> {
        let lock_path = path.with_added_extension("lock");
        let failed = |source| unwritable(path, &lock_path, source);
        let mut file = open_private(&lock_path).map_err(failed)?;
        let deadline = Instant::now() + LOCK_WAIT;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(20));
                }
                Err(TryLockError::WouldBlock) => {
                    let holder = holder(&mut file);
                    return Err(OpenError::InUse {
                        path: path.to_owned(),
                        holder,
                    });
                }
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
        }
        file.set_len(0).map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self(file))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Explicitly, as a child process that is just being started may share the open file.
        let _ = self.0.set_len(0);
        let _ = self.0.unlock();
    }
}

/// Who has written a number into the lock file.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file
        .rewind()
        .and_then(|()| file.take(20).read_to_string(&mut text));
    match (read, text.trim().parse::<u32>()) {
        (Ok(_), Ok(pid)) => format!("process {pid}"),
        _ => "an unknown process".to_owned(),
    }
}

/// Opens a connection, which is used by one thread at a time.
fn connect(path: &Path, access: OpenFlags) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.busy_timeout(BUSY_WAIT)?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(connection)
}

/// What the writing connection needs on top of [`connect`].
fn prepare_for_writing(connection: &Connection) -> rusqlite::Result<()> {
    // Each commit is on the disk before it is answered.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update_and_check(None, "journal_size_limit", LOG_SIZE, |_| Ok(()))
}

/// Checks whose database it is. Returns the version of its schema, 0 for an empty one.
fn identify(path: &Path, connection: &Connection) -> Result<usize, OpenError> {
    let read = || {
        let application: i32 = connection.pragma_query_one(None, "application_id")?;
        let version: u32 = connection.pragma_query_one(None, "user_version")?;
        let empty: bool = connection.query_row(
            "SELECT NOT EXISTS (SELECT * FROM sqlite_schema)",
            [],
            |row| row.get(0),
        )?;
        Ok((application, version, empty))
    };
    let (application, version, empty) =
        read().map_err(|error: rusqlite::Error| OpenError::from_sqlite(path, &error))?;
    let fresh = application == 0 && version == 0 && empty;
    if !fresh && application != APPLICATION_ID {
        return Err(OpenError::Foreign {
            path: path.to_owned(),
        });
    }
    let found = version as usize;
    if found > STEPS.len() {
        return Err(OpenError::Newer {
            path: path.to_owned(),
            found,
            known: STEPS.len(),
        });
    }
    Ok(found)
}

/// Takes the steps that are missing, each in a transaction of its own.
fn migrate(connection: &mut Connection, version: usize) -> rusqlite::Result<()> {
    for (index, step) in STEPS.iter().enumerate().skip(version) {
        let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        tx.execute_batch(step)?;
        tx.pragma_update(None, "application_id", APPLICATION_ID)?;
        tx.pragma_update(
            None,
            "user_version",
            u32::try_from(index + 1).unwrap_or(u32::MAX),
        )?;
        tx.commit()?;
    }
    Ok(())
}
