//! Percent-encoding: RFC 3986 section 2.1, and form encoding's `+` on the way in.

#![warn(clippy::indexing_slicing)]

use std::borrow::Cow;
use zeroize::Zeroizing;

/// Upper case, as RFC 3986 section 2.1 wants it and as Alibaba Cloud's signature does.
const HEX_DIGITS: &[u8; 16] = b"0123456789ABCDEF";

/// Not valid percent-encoded UTF-8: a `%` without two hex digits after it, or bytes that are no text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadEncoding;

/// Appends `text` to `out`, everything but RFC 3986's unreserved characters (`A-Za-z0-9-_.~`) encoded.
///
/// This is the encoding that Alibaba Cloud's Signature V3 prescribes; a space is `%20`.
pub fn encode(text: &str, out: &mut String) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push('%');
            push_digit(byte >> 4, out);
            push_digit(byte & 15, out);
        }
    }
}

/// A form of `pairs`, in their order (`application/x-www-form-urlencoded`, a space as `%20`). Wiped on drop, and
/// never moved while it is made: a value may be a token.
pub(crate) fn form(pairs: &[(&str, &str)]) -> Zeroizing<String> {
    let bytes_max = pairs.iter().map(|(name, value)| 3 * (name.len() + value.len()) + 2).sum();
    let mut form = Zeroizing::new(String::with_capacity(bytes_max));
    for (name, value) in pairs {
        if !form.is_empty() {
            form.push('&');
        }
        encode(name, &mut form);
        form.push('=');
        encode(value, &mut form);
    }
    form
}

fn push_digit(nibble: u8, out: &mut String) {
    out.extend(HEX_DIGITS.get(usize::from(nibble)).copied().map(char::from));
}

/// Decodes a name or a value of a query, in which `+` is a space (form encoding).
///
/// Borrows where nothing is encoded. The result may hold any character, control characters included.
///
/// # Errors
/// [`BadEncoding`] as described there; nothing is guessed or let through undecoded.
pub fn decode_query(text: &str) -> Result<Cow<'_, str>, BadEncoding> {
    decode(text, true)
}

/// Decodes (a part of) a path, in which `+` is itself.
///
/// Borrows where nothing is encoded. An encoded `/` and an encoded `.` come out like plain ones: whoever
/// splits paths does so before, whoever refuses dot segments does so after.
///
/// # Errors
/// [`BadEncoding`] as described there.
pub fn decode_path(text: &str) -> Result<Cow<'_, str>, BadEncoding> {
    decode(text, false)
}

fn decode(text: &str, plus_is_space: bool) -> Result<Cow<'_, str>, BadEncoding> {
    if !text.bytes().any(|byte| byte == b'%' || (plus_is_space && byte == b'+')) {
        return Ok(Cow::Borrowed(text));
    }
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let high = bytes.next().and_then(digit_value).ok_or(BadEncoding)?;
                let low = bytes.next().and_then(digit_value).ok_or(BadEncoding)?;
                high << 4 | low
            }
            b'+' if plus_is_space => b' ',
            _ => byte,
        });
    }
    String::from_utf8(decoded).map(Cow::Owned).map_err(|_| BadEncoding)
}

const fn digit_value(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(text: &str) -> String {
        let mut out = String::new();
        encode(text, &mut out);
        out
    }

    #[test]
    fn encodes_all_but_unreserved() {
        let unreserved = "ABCXYZabcxyz0189-_.~";
        assert_eq!(encoded(unreserved), unreserved);
        assert_eq!(encoded("a/b c*~\u{e9}"), "a%2Fb%20c%2A~%C3%A9");
        assert_eq!(encoded("acs/ecs/i-abc+def=&%?#"), "acs%2Fecs%2Fi-abc%2Bdef%3D%26%25%3F%23");
        assert_eq!(encoded("\0\x7f\u{1f511}"), "%00%7F%F0%9F%94%91");
    }

    #[test]
    fn decodes_query_and_path() {
        for (text, query, path) in [
            ("", "", ""),
            ("plain-name", "plain-name", "plain-name"),
            ("a+b", "a b", "a+b"),
            ("a%2Bb+c", "a+b c", "a+b+c"),
            ("%61%2f%2F%20", "a// ", "a// "),
            ("%C3%a9\u{e9}", "\u{e9}\u{e9}", "\u{e9}\u{e9}"),
            ("%252e", "%2e", "%2e"),
            ("%00", "\0", "\0"),
        ] {
            assert_eq!(decode_query(text).as_deref(), Ok(query), "{text:?}");
            assert_eq!(decode_path(text).as_deref(), Ok(path), "{text:?}");
        }
    }

    #[test]
    fn refuses_what_is_not_encoded_text() {
        for text in [
            "%",
            "%4",
            "a%",
            "%4g",
            "%g4",
            "%%",
            "%+1",
            "% 1",
            "%-1",
            "%C3",
            "%ff",
            "%C3+",
            "%ED%A0%80",
            "%C0%AF",
            "%\u{e9}",
        ] {
            assert_eq!(decode_query(text), Err(BadEncoding), "{text:?}");
            assert_eq!(decode_path(text), Err(BadEncoding), "{text:?}");
        }
    }

    #[test]
    fn borrows_where_nothing_is_encoded() {
        assert!(matches!(decode_query("a/b=c"), Ok(Cow::Borrowed("a/b=c"))));
        assert!(matches!(decode_path("a+b"), Ok(Cow::Borrowed("a+b"))));
    }

    #[test]
    fn what_was_encoded_decodes_to_itself() {
        let all: String = ('\0'..='\u{2ff}').collect();
        assert_eq!(decode_query(&encoded(&all)).as_deref(), Ok(all.as_str()));
        assert_eq!(decode_path(&encoded(&all)).as_deref(), Ok(all.as_str()));
    }
}
