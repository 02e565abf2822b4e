//! Tokens: JWT, HS256, with the claims `name`, `iat` and `exp`.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::FromRequestParts;
use http::header;
use http::request::Parts;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::ApiError;
use crate::secret::JwtSecret;
use crate::worker::App;

/// How long a token is good for.
const LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

/// What a token says.
#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    name: String,
    iat: i64,
    exp: i64,
}

/// A signed token.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Token)]
pub struct Issued {
    /// A JWT, HS256, with the claims `name`, `iat` and `exp`.
    #[schema(example = "eyJ0eXAiOiJKV1QiLCJhbGciOiJIUzI1NiJ9.e30.c2ln")]
    token: String,
    /// When it expires: Unix time, **milliseconds**.
    #[schema(example = 1_796_146_284_000_i64)]
    expires_in: i64,
}

/// Signs tokens and reads them.
pub struct Tokens {
    encoding: EncodingKey,
    decoding: DecodingKey,
    validation: Validation,
}

impl Tokens {
    /// Tokens signed with `secret`.
    pub fn new(secret: &JwtSecret) -> Self {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.leeway = 0;
        validation.validate_exp = true;
        validation.set_required_spec_claims(&["exp"]);
        Self {
            encoding: EncodingKey::from_secret(secret.as_bytes()),
            decoding: DecodingKey::from_secret(secret.as_bytes()),
            validation,
        }
    }

    /// A token for a user.
    ///
    /// # Errors
    /// None that can be expected: signing has no reason to fail.
    pub fn issue(&self, name: &str) -> Result<Issued, ApiError> {
        let iat = jiff::Timestamp::now().as_second();
        let exp = iat + i64::try_from(LIFETIME.as_secs()).unwrap_or(i64::MAX);
        let claims = Claims {
            name: name.to_owned(),
            iat,
            exp,
        };
        let token = jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &self.encoding)
            .map_err(|error| {
            tracing::error!("a token cannot be signed: {error}");
            ApiError::internal()
        })?;
        Ok(Issued {
            token,
            expires_in: exp * 1000,
        })
    }

    /// The user whom a token names.
    ///
    /// # Errors
    /// 401 for whatever is not a valid token of this server.
    pub fn read(&self, token: &str) -> Result<String, ApiError> {
        use jsonwebtoken::errors::ErrorKind;
        let claims = jsonwebtoken::decode::<Claims>(token, &self.decoding, &self.validation)
            .map_err(|error| match error.kind() {
                ErrorKind::ExpiredSignature => ApiError::unauthorized("Token has expired"),
                _ => ApiError::unauthorized("Token is invalid"),
            })?
            .claims;
        if claims.name.is_empty() {
            return Err(ApiError::unauthorized("Token is invalid"));
        }
        Ok(claims.name)
    }
}

/// A user who has proved to be who they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The name.
    pub name: String,
}

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let header = parts
            .headers
            .get(header::AUTHORIZATION)
            .ok_or_else(ApiError::token_missing)?;
        let token = header
            .to_str()
            .map_err(|_| ApiError::unauthorized("Token is invalid"))?;
        app.authenticate(bare(token)).await
    }
}

/// The token in an Authorization header: after `Bearer: ` (as old clients send it), `Bearer `, or
/// by itself.
fn bare(header: &str) -> &str {
    let header = header.trim();
    let (scheme, rest) = header
        .split_at_checked("bearer".len())
        .unwrap_or(("", header));
    if !scheme.eq_ignore_ascii_case("bearer") {
        return header;
    }
    match rest.strip_prefix(':').unwrap_or(rest) {
        // A bare token that happens to begin so.
        token if token == rest && !rest.is_empty() && !rest.starts_with(' ') => header,
        token => token.trim(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_found_in_every_form_of_the_header() {
        for header in [
            "Bearer: abc.d",
            "Bearer abc.d",
            "abc.d",
            "bearer:abc.d",
            " Bearer  abc.d ",
        ] {
            assert_eq!(bare(header), "abc.d", "{header:?}");
        }
        assert_eq!(bare("bearerabc"), "bearerabc");
        assert_eq!(bare("Bearer"), "");
        assert_eq!(bare("ä"), "ä");
    }
}
