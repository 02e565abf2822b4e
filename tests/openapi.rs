//! `docs/openapi.json` is what the server says of itself at `/openapi.json`.
//!
//! To bring it up to date: `BANTER_UPDATE_OPENAPI=1 cargo test --test openapi`.

use std::path::Path;

use banter::worker::http::openapi::document;
use serde_json::Value;

#[test]
fn the_committed_document_is_the_servers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json");
    let served = document();
    if std::env::var_os("BANTER_UPDATE_OPENAPI").is_some() {
        std::fs::write(&path, &served).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let news = served
        .lines()
        .zip(committed.lines().chain(std::iter::repeat("")))
        .enumerate()
        .find(|(_, (served, committed))| served != committed);
    assert!(
        served == committed,
        "docs/openapi.json is not up to date: run BANTER_UPDATE_OPENAPI=1 cargo test --test openapi\n\
         first difference (line from 0, served, committed): {news:?}"
    );
}

#[test]
fn every_operation_tells_its_answers() {
    let document: Value = serde_json::from_str(&document()).unwrap();
    assert_eq!(document["openapi"], "3.1.0");
    let mut operations = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            operations += 1;
            let what = format!("{method} {path}");
            let needs_token = operation["security"]
                .as_array()
                .is_some_and(|all| !all.is_empty());
            let answers = operation["responses"].as_object().unwrap();
            assert_eq!(
                answers.contains_key("401"),
                needs_token || path == "/auth/login",
                "{what}"
            );
            for (status, answer) in answers {
                assert!(
                    !answer["description"].as_str().unwrap().is_empty(),
                    "{what} {status}"
                );
                let schema = &answer["content"]["application/json"]["schema"];
                let error = !status.starts_with(['2', '3']) && path != "/health";
                if error {
                    assert_eq!(
                        schema["$ref"], "#/components/schemas/Error",
                        "{what} {status}"
                    );
                } else if status != "304" {
                    assert!(schema.is_object(), "{what} {status}");
                }
            }
        }
    }
    assert_eq!(operations, 8);
}

#[test]
fn every_schema_that_is_named_is_there() {
    fn named<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get("$ref").and_then(Value::as_str));
                fields.values().for_each(|value| named(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| named(value, found)),
            _ => {}
        }
    }
    let document: Value = serde_json::from_str(&document()).unwrap();
    let mut found = Vec::new();
    named(&document, &mut found);
    assert!(found.contains(&"#/components/schemas/Message"));
    for reference in found {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{reference}");
    }
}
