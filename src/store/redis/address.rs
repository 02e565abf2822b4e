//! Where Redis is: reading `REDIS_URL`.

use std::time::Duration;

use redis::io::tcp::{TcpSettings, socket2};
use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion};

use super::SettingsError;

/// How long an idle TCP connection may be silent before the kernel looks whether its peer is
/// still there, and between two such looks.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Reads a URL: `redis://` and `rediss://` (TLS), with `USER:PASSWORD@` and `/DATABASE` as
/// options, or `unix:PATH` (also `redis+unix:`), with `?user=`, `pass=` and `db=`. The `valkey`
/// forms of the schemes mean the same.
///
/// # Errors
///
/// [`SettingsError::Url`], which shows the URL without its password.
pub(in crate::store) fn parse(url: &str) -> Result<ConnectionInfo, SettingsError> {
    let info = read(url).map_err(|problem| SettingsError::Url {
        url: redacted(url),
        problem,
    })?;
    let redis = info
        .redis_settings()
        .clone()
        // Its push messages let one connection carry subscriptions and commands alike.
        .set_protocol(ProtocolVersion::RESP3)
        .set_lib_name("banter", env!("CARGO_PKG_VERSION"));
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE);
    let tcp = TcpSettings::default()
        .set_nodelay(true)
        .set_keepalive(keepalive);
    Ok(info.set_redis_settings(redis).set_tcp_settings(tcp))
}

/// As [`parse`]; the error says what is wrong with the URL, as the end of a sentence.
fn read(text: &str) -> Result<ConnectionInfo, &'static str> {
    if text.trim().is_empty() {
        return Err("is empty");
    }
    let scheme = text.split_once(':').map(|(scheme, _)| scheme);
    let unix = match scheme.map(str::to_ascii_lowercase).as_deref() {
        Some("redis" | "rediss" | "valkey" | "valkeys") => false,
        Some("unix" | "redis+unix" | "valkey+unix") => true,
        _ => return Err("does not begin with a known scheme"),
    };
    let Some(url) = redis::parse_redis_url(text) else {
        return Err(
            "cannot be read (the port must be a number up to 65535, and in a password \
             the characters / ? # [ ] @ % must be percent-encoded)",
        );
    };
    let database = if unix {
        if url.has_host() && url.host_str() != Some("") {
            return Err("has a host before its path");
        }
        if url.cannot_be_a_base() || url.path().len() < 2 {
            return Err("has no absolute path");
        }
        let database = url.query_pairs().find(|(key, _)| key == "db");
        database.map(|(_, number)| number.into_owned())
    } else {
        if url.host_str().is_none_or(str::is_empty) {
            return Err("has no host");
        }
        if url.fragment().is_some() {
            return Err("has a # part (certificates are always checked)");
        }
        Some(url.path().trim_matches('/').to_owned()).filter(|path| !path.is_empty())
    };
    if database.is_some_and(|number| number.parse::<u32>().is_err()) {
        return Err("has a database that is not a number");
    }
    url.into_connection_info()
        .map_err(|_| "cannot be used (is its user or password not UTF-8, or its host 0.0.0.0?)")
}

/// A URL without what may be a password, however malformed it is.
fn redacted(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    let (scheme, rest) = match url.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), url),
    };
    // A password may itself hold an @, wrongly.
    if let Some((_, host)) = rest.rsplit_once('@') {
        return format!("{scheme}***@{host}");
    }
    // Where the host was forgotten, or a password has a slash, a password looks like a port.
    let authority = rest.split('/').next().unwrap_or_default();
    match authority.rsplit_once(':') {
        Some((_, port))
            if !scheme.is_empty() && !authority.ends_with(']') && port.parse::<u16>().is_err() =>
        {
            format!("{scheme}***")
        }
        _ => format!("{scheme}{rest}"),
    }
}

/// An address as logs and errors show it: without user and password.
pub(in crate::store) fn shown(address: &ConnectionAddr) -> String {
    match address {
        ConnectionAddr::Unix(path) => format!("unix:{}", path.display()),
        ConnectionAddr::TcpTls { .. } => format!("rediss://{address}"),
        _ => format!("redis://{address}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_every_kind_are_understood() {
        let of = |url| {
            let info = parse(url).unwrap();
            let redis = info.redis_settings();
            (
                shown(info.addr()),
                redis.username().map(str::to_owned),
                redis.password().map(str::to_owned),
                redis.db(),
            )
        };
        let plain = |address: &str| (address.to_owned(), None, None, 0);
        assert_eq!(of("redis://example.org"), plain("redis://example.org:6379"));
        assert_eq!(of("redis://[::1]:7000/"), plain("redis://::1:7000"));
        assert_eq!(
            of("rediss://example.org:1"),
            plain("rediss://example.org:1")
        );
        assert_eq!(
            of("valkey://example.org"),
            plain("redis://example.org:6379")
        );
        for url in [
            "unix:/run/r.sock",
            "unix:///run/r.sock",
            "redis+unix:///run/r.sock",
        ] {
            assert_eq!(of(url), plain("unix:/run/r.sock"));
        }
        let credentials = |address: &str, db| {
            let (user, password) = ("me".to_owned(), "p@s/s".to_owned());
            (address.to_owned(), Some(user), Some(password), db)
        };
        assert_eq!(
            of("redis://me:p%40s%2Fs@example.org:99/3"),
            credentials("redis://example.org:99", 3)
        );
        assert_eq!(
            of("unix:/run/a%20b?db=4&user=me&pass=p%40s/s"),
            credentials("unix:/run/a b", 4)
        );
    }

    #[test]
    fn a_bad_url_is_one_line_that_says_what_is_wrong_and_hides_the_password() {
        let cases = [
            ("", "is empty"),
            ("redis:/x", "has no host"),
            ("redis://", "has no host"),
            ("redis:///3", "has no host"),
            ("localhost", "scheme"),
            ("localhost:6379", "scheme"),
            ("http://example.org", "scheme"),
            ("redis://h:port", "cannot be read"),
            ("redis://h:99999", "cannot be read"),
            ("redis://:secret", "cannot be read"),
            ("redis://:sec/ret@h", "cannot be read"),
            ("redis://me:secret@h/one", "not a number"),
            ("redis://me:secret@", "cannot be read"),
            ("redis://me:%ff@h", "cannot be used"),
            ("rediss://me:secret@h/#insecure", "certificates"),
            ("me:secret@h", "scheme"),
            ("unix:r.sock?pass=secret", "no absolute path"),
            ("unix:", "no absolute path"),
            ("unix://run/r.sock", "has a host"),
            ("unix:/run/r.sock?pass=secret&db=x", "not a number"),
        ];
        for (url, expected) in cases {
            let line = parse(url).unwrap_err().to_string();
            assert!(line.contains(expected), "{line}");
            assert!(!line.contains("sec") && !line.contains('\n'), "{line}");
        }
        assert_eq!(
            parse("redis:/x").unwrap_err().to_string(),
            "REDIS_URL: \"redis:/x\" has no host; expected redis://HOST:PORT or unix:PATH"
        );
    }
}
