//! The secret that signs tokens: where it comes from, and which ones are refused.

use std::env;
use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rand::TryRng;
use rand::rngs::SysRng;

use crate::cli::SecretArgs;

/// The fewest bytes of a secret: as many as SHA-256 puts out, below which RFC 7518 (3.2) forbids
/// HS256.
pub const MIN_BYTES: usize = 32;

/// Name of the secret's file, as a credential of systemd and in the state directory.
pub const FILE_NAME: &str = "jwt-secret";

/// More than any secret has; a larger file is a mistake.
const MAX_FILE_BYTES: u64 = 4096;

/// How the operator makes a good one, for the end of an error message.
const HOW: &str = "make one with: head -c 32 /dev/urandom | base64";

/// A secret that has passed the checks. `Debug` does not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct JwtSecret(Vec<u8>);

impl fmt::Debug for JwtSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JwtSecret(…)")
    }
}

/// Where a secret came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A credential of systemd (`LoadCredential=`), in `$CREDENTIALS_DIRECTORY`.
    Credential(PathBuf),
    /// The file that `--jwt-secret-file` (`BANTER_JWT_SECRET_FILE`) names.
    File(PathBuf),
    /// `--jwt-secret` (`JWT_SECRET`) itself.
    Value,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Credential(path) | Self::File(path) => path.display().fmt(f),
            Self::Value => f.write_str("JWT_SECRET"),
        }
    }
}

/// Why there is no secret. Each is for the operator to mend, and none shows the secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// Shorter than [`MIN_BYTES`].
    #[error("{from}: the JWT secret has {bytes} bytes, at least {MIN_BYTES} are needed; {HOW}")]
    TooShort {
        /// Where it came from.
        from: Source,
        /// Its length.
        bytes: usize,
    },
    /// One that everybody knows.
    #[error("{from}: the JWT secret is a well-known example; {HOW}")]
    WellKnown {
        /// Where it came from.
        from: Source,
    },
    /// A few characters over and over.
    #[error("{from}: the JWT secret repeats the same {period} bytes; {HOW}")]
    Repetitive {
        /// Where it came from.
        from: Source,
        /// The length of what is repeated.
        period: usize,
    },
    /// A file that is no secret.
    #[error("{path}: larger than the {MAX_FILE_BYTES} bytes that a JWT secret may have; {HOW}")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A file that cannot be read or made.
    #[error("{path}: cannot {action} the JWT secret: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// `read` or `keep`.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Nothing is set.
    #[error(
        "no JWT secret: set --jwt-secret-file (BANTER_JWT_SECRET_FILE) or JWT_SECRET, or pass the \
         credential {FILE_NAME}; {HOW}"
    )]
    None,
}

impl JwtSecret {
    /// Checks a secret.
    ///
    /// # Errors
    ///
    /// [`SecretError::WellKnown`], [`Repetitive`](SecretError::Repetitive) or
    /// [`TooShort`](SecretError::TooShort).
    pub fn new(secret: impl Into<Vec<u8>>, from: &Source) -> Result<Self, SecretError> {
        let secret = secret.into();
        let from = || from.clone();
        if is_well_known(&secret) {
            return Err(SecretError::WellKnown { from: from() });
        }
        if secret.len() < MIN_BYTES {
            return Err(SecretError::TooShort {
                from: from(),
                bytes: secret.len(),
            });
        }
        // Half of the least secret repeated has less than half of its entropy.
        let repeats = |&period: &usize| {
            secret
                .iter()
                .zip(&secret[period..])
                .all(|(one, other)| one == other)
        };
        if let Some(period) = (1..=MIN_BYTES / 2).find(repeats) {
            return Err(SecretError::Repetitive {
                from: from(),
                period,
            });
        }
        Ok(Self(secret))
    }

    /// The secret that is set, for a master or worker.
    ///
    /// The first one counts of: the credential `jwt-secret` in `$CREDENTIALS_DIRECTORY`, the file of
    /// `--jwt-secret-file`, `JWT_SECRET`. A line break at a file's end does not belong to it. An
    /// empty credential is none: it stands in for a file that does not exist (`SetCredential=`).
    ///
    /// # Errors
    ///
    /// [`SecretError`]; [`SecretError::None`] if none is set.
    pub fn load(args: &SecretArgs) -> Result<Self, SecretError> {
        Self::find(args)?
            .map(|(secret, _)| secret)
            .ok_or(SecretError::None)
    }

    /// Like [`load`](Self::load), with the source, and `None` if none is set. An empty `JWT_SECRET`
    /// is none: so do compose files pass a variable that may be unset.
    ///
    /// # Errors
    ///
    /// [`SecretError`].
    pub fn find(args: &SecretArgs) -> Result<Option<(Self, Source)>, SecretError> {
        find_in(
            env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from),
            args,
        )
    }

    /// The secret kept in `state_dir`; made there, mode 0600, if there is none yet.
    ///
    /// Processes that start at once get the same one, and nobody sees half of it.
    ///
    /// # Errors
    ///
    /// [`SecretError`] if the file cannot be read or made, or holds a bad secret.
    pub fn load_or_create(state_dir: &Path) -> Result<(Self, Source), SecretError> {
        let path = state_dir.join(FILE_NAME);
        let source = Source::File(path.clone());
        if let Some(secret) = read_file(&path)? {
            return Ok((Self::new(secret, &source)?, source));
        }
        create_file(state_dir, &path).map_err(|source| SecretError::Io {
            path: path.clone(),
            action: "keep",
            source,
        })?;
        let secret = read_file(&path)?.ok_or(SecretError::None)?;
        Ok((Self::new(secret, &source)?, source))
    }

    /// The secret itself, for signing.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

fn find_in(
    credentials: Option<PathBuf>,
    args: &SecretArgs,
) -> Result<Option<(JwtSecret, Source)>, SecretError> {
    if let Some(path) = credentials.map(|directory| directory.join(FILE_NAME))
        && let Some(secret) = read_file(&path)?
        && !secret.is_empty()
    {
        let source = Source::Credential(path);
        return Ok(Some((JwtSecret::new(secret, &source)?, source)));
    }
    if let Some(path) = args.jwt_secret_file.clone() {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let secret = read_file(&path)?.ok_or_else(|| read_error(&path)(missing()))?;
        let source = Source::File(path);
        return Ok(Some((JwtSecret::new(secret, &source)?, source)));
    }
    match args.jwt_secret.as_deref() {
        None | Some("") => Ok(None),
        Some(secret) => Ok(Some((
            JwtSecret::new(secret, &Source::Value)?,
            Source::Value,
        ))),
    }
}

/// The file's content without a line break at the end; `None` if there is no such file.
fn read_file(path: &Path) -> Result<Option<Vec<u8>>, SecretError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(read_error(path)(error)),
    };
    let mut secret = Vec::new();
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut secret)
        .map_err(read_error(path))?;
    if secret.len() as u64 > MAX_FILE_BYTES {
        return Err(SecretError::TooLarge {
            path: path.to_owned(),
        });
    }
    if secret.ends_with(b"\n") {
        secret.pop();
        if secret.ends_with(b"\r") {
            secret.pop();
        }
    }
    Ok(Some(secret))
}

fn read_error(path: &Path) -> impl Fn(io::Error) -> SecretError {
    move |source| SecretError::Io {
        path: path.to_owned(),
        action: "read",
        source,
    }
}

/// Makes the file with a new secret, unless somebody else was first.
fn create_file(state_dir: &Path, path: &Path) -> io::Result<()> {
    let mut bytes = [0_u8; MIN_BYTES];
    SysRng
        .try_fill_bytes(&mut bytes)
        .map_err(io::Error::other)?;
    let secret = STANDARD.encode(bytes);

    DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(state_dir)?;
    // Written under another name and then linked, because a link appears whole and fails if the
    // name is taken, unlike a rename.
    let temporary = state_dir.join(format!(".{FILE_NAME}.{:016x}", rand::random::<u64>()));
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        writeln!(file, "{secret}")?;
        file.sync_all()?;
        match std::fs::hard_link(&temporary, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        }
    })();
    let removed = std::fs::remove_file(&temporary);
    written.and(removed)?;
    File::open(state_dir)?.sync_all()
}

/// Whether it is, or begins with, something that documentation, example files or the predecessor's
/// defaults use, however it is spelled.
fn is_well_known(secret: &[u8]) -> bool {
    const KNOWN: [&str; 16] = [
        "shhhh",
        "helloworld",
        "changeme",
        "changethis",
        "changeit",
        "pleasechange",
        "replaceme",
        "replacethis",
        "replacewith",
        "yoursecret",
        "yourjwtsecret",
        "youroptionally",
        "yourownsecret",
        "mysecret",
        "examplesecret",
        "supersecret",
    ];
    let letters: Vec<u8> = secret
        .iter()
        .filter(|byte| byte.is_ascii_alphanumeric())
        .map(u8::to_ascii_lowercase)
        .collect();
    KNOWN
        .iter()
        .any(|known| letters.starts_with(known.as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Barrier;

    use super::*;

    const GOOD: &str = "mJ4lQ8rVxk0tZy2uN7cPdW1sEaHbFg5o";

    fn args(value: Option<&str>, file: Option<&Path>) -> SecretArgs {
        SecretArgs {
            jwt_secret: value.map(str::to_owned),
            jwt_secret_file: file.map(Path::to_owned),
        }
    }

    #[test]
    fn weak_secrets_are_refused_in_one_line_that_says_how_to_make_one_and_not_what_it_was() {
        let long = |text: &str, times| text.repeat(times);
        for (secret, told) in [
            (String::new(), "0 bytes"),
            (GOOD[..31].to_owned(), "31 bytes"),
            ("shhhh".to_owned(), "well-known"),
            ("helloworld".to_owned(), "well-known"),
            (long("Hello World! ", 4), "well-known"),
            ("s".to_owned() + &long("h", 40), "well-known"),
            (
                "change-me-to-32-or-more-random-bytes".to_owned(),
                "well-known",
            ),
            (
                "CHANGE_ME_xxxxxxxxxxxxxxxxxxxxxxxxxxxxx".to_owned(),
                "well-known",
            ),
            (
                "<your-secret-here-at-least-32-characters>".to_owned(),
                "well-known",
            ),
            (long("x", 64), "the same 1 bytes"),
            (long("1234567890", 4), "the same 10 bytes"),
            (long(&GOOD[..16], 2), "the same 16 bytes"),
        ] {
            let error = JwtSecret::new(secret.clone(), &Source::Value)
                .unwrap_err()
                .to_string();
            assert!(error.contains(told), "{secret}: {error}");
            assert!(
                error.contains("head -c 32 /dev/urandom | base64"),
                "{error}"
            );
            assert!(secret.is_empty() || !error.contains(&secret), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn a_good_secret_is_kept_as_it_is_and_not_shown() {
        let secret = JwtSecret::new(GOOD, &Source::Value).unwrap();
        assert_eq!(secret.as_bytes(), GOOD.as_bytes());
        assert!(!format!("{secret:?}").contains(&GOOD[..4]));
    }

    #[test]
    fn the_credential_comes_first_then_the_file_then_the_value() {
        let dir = tempfile::tempdir().unwrap();
        let credentials = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        std::fs::write(&file, format!("file{GOOD}\n")).unwrap();
        let find = |directory: Option<&Path>, args: &SecretArgs| {
            let found = find_in(directory.map(Path::to_owned), args).unwrap();
            found.map(|(secret, _)| String::from_utf8(secret.0).unwrap())
        };
        let value = format!("value{GOOD}");
        let all = args(Some(&value), Some(&file));
        // A credentials directory without this credential is another's.
        assert_eq!(
            find(Some(credentials.path()), &all).unwrap(),
            format!("file{GOOD}")
        );
        std::fs::write(credentials.path().join(FILE_NAME), "\n").unwrap();
        assert_eq!(
            find(Some(credentials.path()), &all).unwrap(),
            format!("file{GOOD}")
        );
        std::fs::write(
            credentials.path().join(FILE_NAME),
            format!("credential{GOOD}\r\n"),
        )
        .unwrap();
        let found = find(Some(credentials.path()), &all).unwrap();
        assert_eq!(found, format!("credential{GOOD}"));
        assert_eq!(find(None, &args(Some(&value), None)).unwrap(), value);
        assert_eq!(find(None, &args(Some(""), None)), None);
        assert_eq!(find(None, &args(None, None)), None);
    }

    #[test]
    fn a_file_that_cannot_be_a_secret_is_an_error_with_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let error = || {
            find_in(None, &args(Some(GOOD), Some(&path)))
                .unwrap_err()
                .to_string()
        };
        assert!(
            error().contains("cannot read the JWT secret"),
            "{}",
            error()
        );
        std::fs::write(&path, "shhhh\n").unwrap();
        assert!(error().contains("well-known"), "{}", error());
        std::fs::write(&path, vec![b'x'; 5000]).unwrap();
        assert!(error().contains("larger than"), "{}", error());
        assert!(error().starts_with(path.to_str().unwrap()), "{}", error());
    }

    #[test]
    fn a_missing_secret_is_made_once_private_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("new/state");
        let (made, source) = JwtSecret::load_or_create(&state).unwrap();
        let path = state.join(FILE_NAME);
        assert_eq!(source, Source::File(path.clone()));
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(
            std::fs::metadata(&state).unwrap().permissions().mode() & 0o777,
            0o700
        );
        assert_eq!(JwtSecret::load_or_create(&state).unwrap().0, made);
        assert_eq!(
            find_in(None, &args(None, Some(&path))).unwrap().unwrap().0,
            made
        );
        assert_eq!(
            std::fs::read_dir(&state).unwrap().count(),
            1,
            "no temporary file is left"
        );

        let other = JwtSecret::load_or_create(&dir.path().join("other"))
            .unwrap()
            .0;
        assert_ne!(other, made);
    }

    #[test]
    fn processes_that_start_at_once_agree_on_the_secret() {
        const THREADS: usize = 8;
        let dir = tempfile::tempdir().unwrap();
        let start = Barrier::new(THREADS);
        let made: Vec<JwtSecret> = std::thread::scope(|scope| {
            let run = || {
                start.wait();
                JwtSecret::load_or_create(dir.path()).unwrap().0
            };
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(run)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert!(made.iter().all(|secret| *secret == made[0]));
    }
}
