//! JSON objects, taken apart without decoding what is in them.
//!
//! serde_json checks a raw value without copying it, whereas it decodes a string with escapes through a buffer of its
//! own, which is not wiped before it is freed (only the binary's [`crate::wipe::WipingAllocator`] does that). So secret
//! data stays raw wherever that is enough ([`crate::kms`] moves it from KMS's reply to a client's as it is), what has to
//! be decoded is wiped on drop, and nothing is decoded that is not needed.
#![warn(clippy::indexing_slicing)]

use serde_json::value::RawValue;
use std::collections::BTreeMap;
use zeroize::Zeroizing;

/// The members of an object, undecoded. Of a name that comes twice the last value counts.
#[derive(Default)]
pub(crate) struct Members<'a>(BTreeMap<String, &'a RawValue>);

impl<'a> Members<'a> {
    /// The members of an object that is all of `json`.
    /// Errors: if it is none. The error may quote some of `json`: a message is to show no more of it than the
    /// place.
    pub(crate) fn of(json: &'a [u8]) -> serde_json::Result<Members<'a>> {
        serde_json::from_slice(json).map(Members)
    }

    /// A member's value, in JSON.
    pub(crate) fn raw(&self, name: &str) -> Option<&'a str> {
        self.0.get(name).map(|value| value.get())
    }

    /// A member's text, if it is a string.
    pub(crate) fn text(&self, name: &str) -> Option<Zeroizing<String>> {
        self.raw(name).and_then(text)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// The text of a JSON string.
pub(crate) fn text(json: &str) -> Option<Zeroizing<String>> {
    serde_json::from_str(json).ok().map(Zeroizing::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_found_by_their_decoded_names() {
        let json = r#" {"a": "x\n", "b": {"c": [1 ,2]}, "\u0064": 7, "a": "y\u00e9"} "#;
        let members = Members::of(json.as_bytes()).unwrap();
        assert_eq!(members.len(), 3);
        assert_eq!(members.text("a").as_ref().map(|it| it.as_str()), Some("yé"), "the last one");
        assert_eq!(members.raw("b"), Some(r#"{"c": [1 ,2]}"#), "as it stands there");
        assert_eq!(
            (members.raw("d"), members.text("d").is_none(), members.raw("e")),
            (Some("7"), true, None)
        );
        for json in ["", "[]", "\"a\"", "{", "{}{}", "{\"a\":01}", "\u{feff}{}"] {
            assert!(Members::of(json.as_bytes()).is_err(), "{json}");
        }
    }
}
