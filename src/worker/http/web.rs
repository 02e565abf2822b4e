//! The page that people chat on: files of `src/web`, carried in the binary.
//!
//! `GET /` gives the page itself. It is asked for again on each visit, and names everything else
//! under `/web/VERSION/`, where the version is a digest of all files: what is found there never
//! changes, and is kept by browsers for good. Modules that import each other by relative paths stay
//! within one version.

use std::sync::LazyLock;

use axum::Router;
use axum::extract::Path;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use sha2::{Digest as _, Sha256};

use super::error::ApiError;

/// What the page may do: nothing but load its own files and talk to its own server. Whatever a
/// message holds, it cannot run, load or send anything, nor can the page be framed.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
     img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
     require-trusted-types-for 'script'; trusted-types 'none'";

/// Sent with every file.
const SECURITY: [(HeaderName, &str); 4] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        "same-origin",
    ),
];

/// For the page, and for files asked for under another version than this binary's, as happens while a
/// server is being replaced: kept, but asked for each time.
const REVALIDATE: &str = "no-cache";
/// For files under their own version.
const FOR_GOOD: &str = "public, max-age=31536000, immutable";

/// What stands in the page for the folder of its files.
const FOLDER: &str = "{{web}}";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// The files beside the page: name, content type, content.
macro_rules! files {
    ($($name:literal: $kind:expr,)*) => {
        [$(($name, $kind, include_bytes!(concat!("../../web/", $name)).as_slice()),)*]
    };
}

/// The page.
const PAGE: &str = include_str!("../../web/index.html");

/// Everything that it is made of.
const FILES: [(&str, &str, &[u8]); 17] = files! {
    "api.js": JS,
    "app.js": JS,
    "channel.js": JS,
    "composer.js": JS,
    "dom.js": JS,
    "emoji.js": JS,
    "favicon.svg": SVG,
    "favicon-unread.svg": SVG,
    "markdown.js": JS,
    "notify.js": JS,
    "preferences.js": JS,
    "session.js": JS,
    "sidebar.js": JS,
    "socketio.js": JS,
    "style.css": CSS,
    "theme.js": JS,
    "timeline.js": JS,
};

/// All of it, made ready once: compressed, and with digests.
static SITE: LazyLock<Site> = LazyLock::new(Site::new);

/// The page and its files, ready to be sent.
struct Site {
    version: String,
    page: Asset,
    files: Vec<(&'static str, Asset)>,
}

/// One file, ready to be sent.
pub struct Asset {
    kind: &'static str,
    plain: Variant,
    gzip: Variant,
}

/// One encoding of it.
struct Variant {
    body: Bytes,
    /// Strong, so each encoding has its own.
    tag: String,
}

/// The routes of the page.
pub fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/", get(page))
        .route("/web/{version}/{file}", get(file))
}

async fn page(headers: HeaderMap) -> Response {
    SITE.page.answer_anew(&headers)
}

async fn file(Path((version, name)): Path<(String, String)>, headers: HeaderMap) -> Response {
    let Some((_, asset)) = SITE.files.iter().find(|(known, _)| *known == name) else {
        return ApiError::not_found().into_response();
    };
    let keep = if version == SITE.version {
        FOR_GOOD
    } else {
        REVALIDATE
    };
    asset.answer(&headers, keep)
}

impl Site {
    fn new() -> Self {
        let mut all = Sha256::new();
        for (name, _, content) in &FILES {
            all.update(name.as_bytes());
            all.update(Sha256::digest(content));
        }
        let version = short(&all.finalize());
        let page = PAGE.replace(FOLDER, &format!("web/{version}"));
        Self {
            page: Asset::new(HTML, page.into_bytes().into()),
            files: FILES
                .iter()
                .map(|(name, kind, content)| (*name, Asset::new(kind, Bytes::from_static(content))))
                .collect(),
            version,
        }
    }
}

impl Asset {
    /// A file of a content type.
    pub fn new(kind: &'static str, content: Bytes) -> Self {
        let digest = short(&Sha256::digest(&content));
        Self {
            kind,
            gzip: Variant {
                body: compress(&content).into(),
                tag: format!("\"{digest}-gzip\""),
            },
            plain: Variant {
                body: content,
                tag: format!("\"{digest}\""),
            },
        }
    }

    /// The file, or that the client has it already; clients ask for it each time.
    pub fn answer_anew(&self, request: &HeaderMap) -> Response {
        self.answer(request, REVALIDATE)
    }

    /// The file, or that the client has it already.
    fn answer(&self, request: &HeaderMap, keep: &'static str) -> Response {
        let zipped = accepts_gzip(request);
        let variant = if zipped { &self.gzip } else { &self.plain };
        let known = has(request, &variant.tag);
        let mut response = if known {
            StatusCode::NOT_MODIFIED.into_response()
        } else {
            variant.body.clone().into_response()
        };
        let headers = response.headers_mut();
        for (name, value) in SECURITY {
            headers.insert(name, HeaderValue::from_static(value));
        }
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(keep));
        headers.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
        if let Ok(tag) = HeaderValue::from_str(&variant.tag) {
            headers.insert(header::ETAG, tag);
        }
        if known {
            headers.remove(header::CONTENT_TYPE);
        } else {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.kind));
            if zipped {
                headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            }
        }
        response
    }
}

/// Enough of a digest to tell files apart.
fn short(digest: &[u8]) -> String {
    let kept = digest.get(..12).unwrap_or(digest);
    BASE64_URL_SAFE_NO_PAD.encode(kept)
}

/// Only gzip: browsers ask for better ones over TLS alone, which is a proxy's business, and
/// proxies compress on their own.
fn compress(content: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    // Writing to memory cannot fail.
    let _ = encoder.write_all(content);
    encoder.finish().unwrap_or_default()
}

/// Whether `Accept-Encoding` allows gzip.
fn accepts_gzip(request: &HeaderMap) -> bool {
    let mut any = None;
    for item in items(request, &header::ACCEPT_ENCODING) {
        let (name, parameters) = item.split_once(';').unwrap_or((item, ""));
        let weight = parameters.trim().trim_start_matches(['q', 'Q']);
        let weight = weight.trim_start().strip_prefix('=').unwrap_or("1");
        let wanted = weight.trim().parse().is_ok_and(|weight: f32| weight > 0.0);
        match name.trim().to_ascii_lowercase().as_str() {
            "gzip" | "x-gzip" => return wanted,
            "*" => any = Some(wanted),
            _ => {}
        }
    }
    any.unwrap_or(false)
}

/// Whether `If-None-Match` names this tag.
fn has(request: &HeaderMap, tag: &str) -> bool {
    items(request, &header::IF_NONE_MATCH).any(|item| {
        let item = item.trim();
        item == "*" || item.strip_prefix("W/").unwrap_or(item) == tag
    })
}

/// The items of a header that is a list, over all of its lines. (Our tags hold no commas.)
fn items<'a>(request: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    request
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|line| line.split(','))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: HeaderName, value: &'static str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_static(value));
        headers
    }

    #[test]
    fn gzip_is_sent_to_those_that_ask_for_it() {
        let accepts = |value| accepts_gzip(&with(header::ACCEPT_ENCODING, value));
        for yes in [
            "gzip",
            "GZIP",
            "deflate, gzip;q=0.5",
            "br, gzip",
            "*",
            "x-gzip",
        ] {
            assert!(accepts(yes), "{yes}");
        }
        for no in [
            "",
            "br",
            "identity",
            "gzip;q=0",
            "gzip; q = 0.0",
            "*;q=0",
            "*, gzip;q=0",
            "gzip;q=x",
        ] {
            assert!(!accepts(no), "{no}");
        }
        assert!(!accepts_gzip(&HeaderMap::new()));
    }

    #[test]
    fn a_tag_is_found_in_a_list() {
        let known = |value| has(&with(header::IF_NONE_MATCH, value), "\"abc\"");
        for yes in ["\"abc\"", "W/\"abc\"", "\"x\", \"abc\"", "*"] {
            assert!(known(yes), "{yes}");
        }
        for no in ["\"abcd\"", "abc", "\"x\", \"y\""] {
            assert!(!known(no), "{no}");
        }
    }

    #[test]
    fn the_page_names_only_files_that_there_are() {
        let page = String::from_utf8(SITE.page.plain.body.to_vec()).unwrap();
        let folder = format!("web/{}/", SITE.version);
        let named: Vec<_> = page
            .split(&folder)
            .skip(1)
            .map(|rest| rest.split('"').next().unwrap())
            .collect();
        assert!(!named.is_empty());
        for name in named {
            assert!(
                SITE.files.iter().any(|(known, _)| *known == name),
                "{name} is named, but there is no such file"
            );
        }
        assert!(!page.contains(FOLDER));
    }

    #[test]
    fn every_file_of_the_folder_is_served() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/web");
        let mut there: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "index.html")
            .collect();
        there.sort();
        let mut served: Vec<_> = FILES.iter().map(|(name, ..)| (*name).to_owned()).collect();
        served.sort();
        assert_eq!(there, served);
    }
}
