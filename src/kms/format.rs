//! KMS's reply in the words of others: ResponseType 1 (AWS `GetSecretValue`) and 2 (HashiCorp KV, versions 1
//! and 2).
//!
//! Secret data is moved as the JSON text that KMS sent, so that no escape is decoded and encoded again and
//! no copy of it is left behind; all buffers here are wiped.
#![warn(clippy::indexing_slicing)]

use crate::json::Members;
use crate::time::unix_s_of;
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::io::Write as _;
use zeroize::Zeroizing;

/// AWS's names of KMS's stages, and KMS's own.
const AWS_STAGES: [(&str, &str); 2] = [("AWSCURRENT", "ACSCurrent"), ("AWSPREVIOUS", "ACSPrevious")];

/// Which version of HashiCorp's KV secrets engine a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kv {
    /// `{PathPrefix}ID`
    V1,
    /// `{PathPrefix}secret/data/ID`
    V2,
}

/// The stage that a client of AWS's calls so; other names are KMS's to judge.
pub(crate) fn stage_from_aws(stage: &str) -> &str {
    AWS_STAGES.iter().find(|(theirs, _)| *theirs == stage).map_or(stage, |(_, ours)| ours)
}

fn stage_to_aws(stage: &str) -> &str {
    AWS_STAGES.iter().find(|(_, ours)| *ours == stage).map_or(stage, |(theirs, _)| theirs)
}

/// The members of KMS's reply, which [`super::reply`] has found sound.
fn members(body: &[u8]) -> Members<'_> {
    let members = Members::of(body);
    debug_assert!(members.is_ok(), "a reply that super::reply has not judged");
    members.unwrap_or_default()
}

fn stages(members: &Members<'_>) -> Vec<String> {
    let stages = members.raw("VersionStages").and_then(|raw| serde_json::from_str(raw).ok());
    let mut stages: BTreeMap<String, Vec<String>> = stages.unwrap_or_default();
    stages.remove("VersionStage").unwrap_or_default()
}

/// What the names and fixed values of a reply may take, in bytes; the longest, KV version 2's, takes 300. Room that is
/// not used costs a hit too: it is wiped.
pub const OWN_BYTES: usize = 512;

/// An object under construction; it never outgrows its first allocation, and is wiped.
struct Object(Zeroizing<Vec<u8>>);

impl Object {
    /// Room for what is taken from KMS's reply and `more`: growing would leave an unwiped copy behind.
    fn with_room_for(body: &[u8], more: usize) -> Object {
        let mut bytes = Zeroizing::new(Vec::with_capacity(body.len() + OWN_BYTES + more));
        bytes.push(b'{');
        Object(bytes)
    }

    /// A member whose value is JSON already.
    fn raw(&mut self, name: &str, json: &str) {
        if !self.0.ends_with(b"{") {
            self.0.push(b',');
        }
        let _ = write!(self.0, "\"{name}\":{json}");
    }

    fn open(&mut self, name: &str) {
        self.raw(name, "{");
    }

    fn close(&mut self) {
        self.0.push(b'}');
    }

    fn string(&mut self, name: &str, text: &str) {
        self.raw(name, &serde_json::Value::from(text).to_string());
    }

    fn end(mut self) -> Zeroizing<Vec<u8>> {
        self.0.push(b'}');
        self.0
    }
}

/// The reply of AWS's `GetSecretValue`. `asked_id` is the `ARN` if it is one.
#[must_use]
pub fn aws(asked_id: &str, body: &[u8]) -> Zeroizing<Vec<u8>> {
    let members = members(body);
    // An escaped character takes up to six bytes.
    let mut object = Object::with_room_for(body, 6 * asked_id.len());
    if asked_id.starts_with("acs:") {
        object.string("ARN", asked_id);
    }
    for (theirs, ours) in [("Name", "SecretName"), ("VersionId", "VersionId")] {
        if let Some(raw) = members.raw(ours) {
            object.raw(theirs, raw);
        }
    }
    if let Some(raw) = members.raw("SecretData") {
        let binary = members.text("SecretDataType").is_some_and(|it| *it == "binary");
        object.raw(if binary { "SecretBinary" } else { "SecretString" }, raw);
    }
    let stages: Vec<String> = stages(&members).iter().map(|stage| stage_to_aws(stage).to_owned()).collect();
    object.raw("VersionStages", &serde_json::Value::from(stages).to_string());
    if let Some(created) = members.text("CreateTime").and_then(|date| unix_s_of(&date)) {
        object.string("CreatedDate", &created.to_string());
    }
    object.end()
}

/// The reply of HashiCorp's KV engine. `lease_s`: seconds of freshness left.
#[must_use]
pub fn vault(kv: Kv, body: &[u8], lease_s: u64) -> Zeroizing<Vec<u8>> {
    let members = members(body);
    let mut object = Object::with_room_for(body, 0);
    object.raw("request_id", members.raw("RequestId").unwrap_or("\"\""));
    object.string("lease_id", "");
    object.raw("renewable", "false");
    object.raw("lease_duration", &lease_s.to_string());
    if kv == Kv::V2 {
        object.open("data");
    }
    let raw = members.raw("SecretData").unwrap_or("\"\"");
    match decoded_object(raw) {
        Some(json) => object.raw("data", &json),
        None => {
            object.open("data");
            object.raw("value", raw);
            object.close();
        }
    }
    if kv == Kv::V2 {
        object.open("metadata");
        object.raw("created_time", members.raw("CreateTime").unwrap_or("\"\""));
        object.string("deletion_time", "");
        object.raw("destroyed", "false");
        // Clients want a number here; KMS's version ids are none and stand below.
        object.raw("version", "1");
        object.open("custom_metadata");
        for (theirs, ours) in [("version_id", "VersionId"), ("secret_type", "SecretType")] {
            if let Some(raw) = members.raw(ours) {
                object.raw(theirs, raw);
            }
        }
        object.string("version_stages", &stages(&members).join(","));
        object.close();
        object.close();
        object.close();
    }
    for nothing in ["wrap_info", "warnings", "auth"] {
        object.raw(nothing, "null");
    }
    object.end()
}

/// The text of a JSON string, if it is a JSON object itself.
fn decoded_object(raw: &str) -> Option<Zeroizing<String>> {
    let text = decoded(raw)?;
    let is_object = text.trim_start().starts_with('{') && serde_json::from_str::<&RawValue>(&text).is_ok();
    is_object.then_some(text)
}

/// The text of a sound JSON string; `None` if half of a surrogate pair makes it no text (RFC 8259 8.2).
///
/// serde_json would decode it through a buffer of its own that nobody wipes.
fn decoded(raw: &str) -> Option<Zeroizing<String>> {
    let mut rest = raw.strip_prefix('"')?.strip_suffix('"')?;
    // No escape is shorter than what it stands for, so this never grows and leaves nothing behind.
    let mut text = Zeroizing::new(String::with_capacity(rest.len()));
    while let Some((plain, escape)) = rest.split_once('\\') {
        text.push_str(plain);
        let mut chars = escape.chars();
        let decoded = match chars.next()? {
            'b' => '\u{8}',
            'f' => '\u{c}',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'u' => {
                let (unit, after) = utf16_unit(chars.as_str())?;
                chars = after.chars();
                match char::from_u32(u32::from(unit)) {
                    Some(decoded) => decoded,
                    None => {
                        let (low, after) = utf16_unit(after.strip_prefix("\\u")?)?;
                        chars = after.chars();
                        char::decode_utf16([unit, low]).next()?.ok()?
                    }
                }
            }
            // A quote, a backslash, a slash: themselves.
            itself => itself,
        };
        text.push(decoded);
        rest = chars.as_str();
    }
    text.push_str(rest);
    Some(text)
}

/// Four hex digits, and what follows them.
fn utf16_unit(text: &str) -> Option<(u16, &str)> {
    let (digits, rest) = text.split_at_checked(4)?;
    Some((u16::from_str_radix(digits, 16).ok()?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn body(data: &str) -> Vec<u8> {
        let stages = json!({"VersionStage": ["ACSCurrent", "UStage1"]});
        let body = json!({
            "SecretName": "db", "VersionId": "v\"1", "SecretData": data, "SecretDataType": "text",
            "SecretType": "Generic", "VersionStages": stages, "CreateTime": "2020-07-23T11:56:29Z",
            "RequestId": "6a3e"
        });
        body.to_string().into_bytes()
    }

    fn read(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    #[test]
    fn aws_has_its_own_names() {
        let data = "a\"b\\\u{1}é";
        assert_eq!(
            read(&aws("db", &body(data))),
            json!({"Name": "db", "VersionId": "v\"1", "SecretString": data,
                   "VersionStages": ["AWSCURRENT", "UStage1"], "CreatedDate": "1595505389"})
        );
        let arn = "acs:kms:cn-hangzhou:1:secret/db";
        assert_eq!(read(&aws(arn, &body(data)))["ARN"], arn);
        let binary = String::from_utf8(body("AAEC")).unwrap().replace("\"text\"", "\"binary\"");
        let binary = read(&aws("db", binary.as_bytes()));
        assert_eq!((&binary["SecretBinary"], &binary["SecretString"]), (&json!("AAEC"), &Value::Null));
    }

    #[test]
    fn aws_stages_go_both_ways() {
        for (theirs, ours) in [("AWSCURRENT", "ACSCurrent"), ("AWSPREVIOUS", "ACSPrevious"), ("X", "X")] {
            assert_eq!((stage_from_aws(theirs), stage_to_aws(ours)), (ours, theirs));
        }
    }

    #[test]
    fn kv_takes_objects_apart_and_wraps_the_rest() {
        for (data, expected) in [
            (r#"{"user":"u","n":1e400,"d":{"a":[]}}"#, None),
            ("plain", Some("plain")),
            ("[1,2]", Some("[1,2]")),
            ("{broken", Some("{broken")),
            ("", Some("")),
            ("\"x\"", Some("\"x\"")),
        ] {
            let v1 = vault(Kv::V1, &body(data), 7);
            let v2 = vault(Kv::V2, &body(data), 7);
            if let Some(value) = expected {
                assert_eq!(read(&v1)["data"], json!({"value": value}));
                assert_eq!(read(&v2)["data"]["data"], json!({"value": value}));
            } else {
                let v1 = std::str::from_utf8(&v1).unwrap();
                assert!(v1.contains(&format!("\"data\":{data},")), "verbatim: {v1}");
            }
        }
        let v2 = read(&vault(Kv::V2, &body("x"), 7));
        assert_eq!(v2["lease_duration"], 7);
        assert_eq!(v2["data"]["metadata"]["created_time"], "2020-07-23T11:56:29Z");
        assert_eq!(v2["data"]["metadata"]["custom_metadata"]["version_stages"], "ACSCurrent,UStage1");
    }

    #[test]
    fn strings_are_decoded_as_json_is() {
        for raw in [
            r#""""#,
            r#""plain \u00fc é 😀""#,
            r#""\"\\\/\b\f\n\r\t\u0000\u001f\u2028\uFFFF""#,
            r#""{\"a\":\"\\ud800\\u0041\\\"\"}""#,
            r#""\ud83d\ude00x\uD83D\uDE00""#,
            r#""\ud800""#,
            r#""\ud800x""#,
            r#""\ud800\n""#,
            r#""\ud800\u0041""#,
            r#""\ud800\ud800\udc00""#,
            r#""\udc00\ud800""#,
        ] {
            let expected: Option<String> = serde_json::from_str(raw).ok();
            let text = decoded(raw);
            assert_eq!(text.as_ref().map(|it| it.as_str()), expected.as_deref(), "{raw}");
            assert!(text.is_none_or(|it| it.capacity() == raw.len() - 2), "{raw}: it grew");
        }
    }

    #[test]
    fn nothing_outgrows_its_allocation() {
        let arn = "acs:".to_owned() + &"\u{1}".repeat(508);
        // The data is the largest part, or nothing is there at all.
        for body in [body(&"\u{1}".repeat(5000)), body(""), b"{}".to_vec()] {
            for (bytes, more) in [
                (aws(&arn, &body), 6 * arn.len()),
                (vault(Kv::V1, &body, 7), 0),
                (vault(Kv::V2, &body, u64::MAX), 0),
            ] {
                assert!(bytes.len() <= bytes.capacity(), "{}", bytes.len());
                assert_eq!(bytes.capacity(), body.len() + OWN_BYTES + more, "it grew");
            }
        }
    }
}
