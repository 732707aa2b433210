//! The verifier against the official SDKs' vectors (`tests/acs3_vectors.json` says how they were made).

use super::*;
use serde_json::Value;

struct Vector {
    name: String,
    method: String,
    path: String,
    query: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    id: String,
    secret: String,
    token: Option<String>,
    signed_names: Vec<String>,
    now: i64,
}

impl Vector {
    fn verify(&self) -> Result<Verified, Refusal> {
        let request = SignedRequest {
            method: &self.method,
            path: &self.path,
            query: &self.query,
            headers: &self.headers,
            body: &self.body,
        };
        verify(&request, self.now, |id, token| {
            if id != self.id {
                return Err(Refusal::UnknownAccessKey);
            }
            if token != self.token.as_deref() {
                return Err(Refusal::TokenMalformed);
            }
            Ok(self.secret.clone())
        })
    }

    fn header_mut(&mut self, name: &str) -> &mut String {
        &mut self.headers.iter_mut().find(|(n, _)| n == name).expect("the header is there").1
    }
}

fn vectors() -> Vec<Vector> {
    let file: Value = serde_json::from_str(include_str!("../../tests/acs3_vectors.json")).expect("JSON");
    let text = |v: &Value, key: &str| v[key].as_str().map(str::to_owned);
    let list = file["acs3"].as_array().expect("a list");
    list.iter()
        .map(|v| {
            let mut headers: Vec<(String, String)> = v["headers"]
                .as_object()
                .expect("headers")
                .iter()
                .map(|(n, value)| (n.clone(), value.as_str().expect("text").to_owned()))
                .collect();
            let date = v["headers"]["x-acs-date"].as_str().expect("a date");
            let now = clock::parse_iso8601(date).expect("a date");
            headers.push(("authorization".into(), text(v, "authorization").expect("authorization")));
            Vector {
                name: text(v, "name").expect("name"),
                method: text(v, "method").expect("method"),
                path: text(v, "path").expect("path"),
                query: text(v, "wire_query").expect("wire query"),
                headers,
                body: text(v, "body").expect("body").into_bytes(),
                id: text(v, "access_key_id").expect("id"),
                secret: text(v, "access_key_secret").expect("secret"),
                token: text(v, "security_token"),
                signed_names: text(v, "signed_headers")
                    .expect("names")
                    .split(';')
                    .map(str::to_owned)
                    .collect(),
                now,
            }
        })
        .collect()
}

/// The text with one bit of one byte turned, for every byte that stays text.
fn mutations(text: &str) -> Vec<String> {
    (0..text.len())
        .filter_map(|i| {
            let mut bytes = text.as_bytes().to_vec();
            bytes[i] ^= 1;
            String::from_utf8(bytes).ok()
        })
        .collect()
}

#[test]
fn accepts_every_vector() {
    let all = vectors();
    assert_eq!(all.len(), 8);
    for vector in all {
        let verified = vector.verify().unwrap_or_else(|e| panic!("{}: {e:?}", vector.name));
        assert_eq!(verified.access_key_id, vector.id);
    }
}

#[test]
fn accepts_plus_for_a_space() {
    let mut vector = vectors().into_iter().find(|v| v.name == "gsv-sts-special").expect("the vector");
    assert!(vector.query.contains("%20"));
    vector.query = vector.query.replace("%20", "+");
    assert!(vector.verify().is_ok());
}

#[test]
fn refuses_one_changed_byte_of_anything_signed() {
    let mut tried = 0;
    for index in 0..vectors().len() {
        let fresh = || vectors().into_iter().nth(index).expect("in range");
        let mut refused = |what: &str, vector: Vector| {
            tried += 1;
            assert!(vector.verify().is_err(), "{}: {what} changed, yet accepted", vector.name);
        };
        let original = fresh();
        for text in mutations(&original.method) {
            refused("method", Vector { method: text, ..fresh() });
        }
        for text in mutations(&original.path) {
            refused("path", Vector { path: text, ..fresh() });
        }
        for text in mutations(&original.query) {
            refused("query", Vector { query: text, ..fresh() });
        }
        for name in original.signed_names.iter().map(String::as_str).chain(["authorization"]) {
            for text in mutations(&fresh().header_mut(name).clone()) {
                let mut changed = fresh();
                *changed.header_mut(name) = text;
                refused(name, changed);
            }
        }
        for i in 0..original.body.len() {
            let mut changed = fresh();
            changed.body[i] ^= 1;
            refused("body", changed);
        }
        for text in mutations(&original.secret) {
            refused("secret", Vector { secret: text, ..fresh() });
        }
    }
    assert!(tried > 4_000, "only {tried} mutations");
}

#[test]
fn what_steers_the_call_must_be_signed() {
    for vector in vectors() {
        for name in ALWAYS_SIGNED.into_iter().chain(["x-acs-security-token", "content-type"]) {
            let mut changed = vectors().into_iter().find(|v| v.name == vector.name).expect("itself");
            if !changed.signed_names.iter().any(|n| n == name) {
                continue;
            }
            let names: Vec<&str> = vector.signed_names.iter().map(String::as_str).collect();
            let fewer: Vec<&str> = names.iter().copied().filter(|n| *n != name).collect();
            let header = changed.header_mut("authorization");
            *header = header.replace(&names.join(";"), &fewer.join(";"));
            assert!(
                matches!(changed.verify(), Err(Refusal::Incomplete(_))),
                "{}: {name} unsigned, yet not refused",
                vector.name
            );
        }
    }
}

#[test]
fn the_clock_may_differ_by_a_quarter_of_an_hour() {
    let mut vector = vectors().remove(1);
    let sent = vector.now;
    for (now, expected) in [
        (sent + CLOCK_SKEW_MAX_S, None),
        (sent - CLOCK_SKEW_MAX_S, None),
        (sent + CLOCK_SKEW_MAX_S + 1, Some(Refusal::TimestampExpired)),
        (sent - CLOCK_SKEW_MAX_S - 1, Some(Refusal::TimestampAhead)),
    ] {
        vector.now = now;
        assert_eq!(vector.verify().err(), expected, "{}", now - sent);
    }
}
