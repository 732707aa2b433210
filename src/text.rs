//! Rules about text that more than one module needs.
//!
//! # Foreign text
//!
//! What KMS, a client, a file or a program's name says may hold line breaks that forge a line of the log, escapes that
//! a terminal obeys, or marks that turn the direction of what follows. One rule makes all of it harmless, in the log, in
//! errors and in replies alike: a character that a reader sees as itself is [`shown`] as itself, every other one escaped
//! as in a Rust string (`\n`, `\u{202e}`). So nothing is hidden: an operator sees what was really sent. Bytes that are no
//! UTF-8 are to become U+FFFD before ([`String::from_utf8_lossy`]).
//!
//! There are two forms of it, since only between quotes a quote must not end the text: [`escape`] is for there and
//! escapes quotes and backslashes too; [`excerpt`] is for running text, in which a message of KMS's or a value of the
//! configuration should keep its own quotes.
#![warn(clippy::indexing_slicing)]

use std::fmt::{self, Display, Write as _};

/// Marks text that was cut.
pub(crate) const ELLIPSIS: char = '…';
/// Characters that [`escape`] lets through; the rest is cut off.
pub(crate) const ESCAPE_CHARS_MAX: usize = 256;

/// Whether a byte is [`shown`] as itself, and is all of its character.
pub(crate) fn is_plain(byte: u8) -> bool {
    byte == b' ' || byte.is_ascii_graphic()
}

/// How a character of foreign text is shown.
pub(crate) fn shown(c: char) -> impl Iterator<Item = char> {
    let itself = matches!(c, '"' | '\'' | '\\').then_some(c);
    let escaped = itself.is_none().then(|| c.escape_debug());
    itself.into_iter().chain(escaped.into_iter().flatten())
}

/// Foreign text for a message, at most `bytes_max` bytes of it (3 or more): what is cut ends in an ellipsis.
pub(crate) fn excerpt(text: &str, bytes_max: usize) -> String {
    debug_assert!(bytes_max >= ELLIPSIS.len_utf8());
    let mut kept = String::new();
    for c in text.chars() {
        let before = kept.len();
        kept.extend(shown(c));
        if kept.len() > bytes_max {
            kept.truncate(before);
            while kept.len() + ELLIPSIS.len_utf8() > bytes_max && kept.pop().is_some() {}
            kept.push(ELLIPSIS);
            break;
        }
    }
    kept
}

/// Foreign text between quotes, at most [`ESCAPE_CHARS_MAX`] characters of it: what is cut ends in an ellipsis.
pub(crate) fn escape(text: &str) -> impl Display {
    Escaped(text)
}

struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |byte: u8| is_plain(byte) && !matches!(byte, b'"' | b'\'' | b'\\');
        if self.0.len() <= ESCAPE_CHARS_MAX && self.0.bytes().all(plain) {
            return f.write_str(self.0);
        }
        let mut chars = self.0.chars();
        for c in chars.by_ref().take(ESCAPE_CHARS_MAX) {
            write!(f, "{}", c.escape_debug())?;
        }
        if chars.next().is_some() { f.write_char(ELLIPSIS) } else { Ok(()) }
    }
}

/// The longest name of a RAM role, in bytes.
pub(crate) const ROLE_NAME_BYTES_MAX: usize = 64;

/// `bytes` as lower-case hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).flatten().collect()
}

/// `1*DIGIT`, as RFC 9110 8.6 wants a Content-Length: `str::parse` alone would take `+5` too. `None` also for
/// what overflows.
pub(crate) fn decimal(digits: &[u8]) -> Option<u64> {
    let all_digits = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits).ok().filter(|_| all_digits)?.parse().ok()
}

/// `tchar` of RFC 9110 5.6.2: what the name of a header consists of.
pub(crate) const fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(byte, b'!' | b'#'..=b'\'' | b'*' | b'+' | b'-' | b'.' | b'^'..=b'`' | b'|' | b'~')
}

/// What the names of RAM roles and of application access points consist of.
pub(crate) const fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}

/// Whether `name` can be a RAM role's. It goes into the path of a request to the metadata service, where a dot
/// segment would ask for something else.
pub(crate) fn is_role_name(name: &str) -> bool {
    (1..=ROLE_NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(is_name_byte)
        && !matches!(name, "." | "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_is_shown_as_it_is_or_escaped() {
        for (text, expected) in [
            ("plain geheim ö 秘密", "plain geheim ö 秘密"),
            (r#"a "b" \c"#, r#"a "b" \c"#),
            ("a\nb\r\tc\0\u{7f}\u{1b}[31m", r"a\nb\r\tc\0\u{7f}\u{1b}[31m"),
            // C1, line separators, directions, what is invisible: as far as the code points go that look like nothing.
            ("\u{85}\u{9b}\u{2028}\u{2029}", r"\u{85}\u{9b}\u{2028}\u{2029}"),
            (
                "\u{61c}\u{200e}\u{202a}\u{202e}\u{2066}\u{2069}",
                r"\u{61c}\u{200e}\u{202a}\u{202e}\u{2066}\u{2069}",
            ),
            ("\u{ad}\u{200b}\u{feff}\u{fff9}\u{e0041}", r"\u{ad}\u{200b}\u{feff}\u{fff9}\u{e0041}"),
            ("\u{a0}\u{3000}\u{301}\u{e000}", r"\u{a0}\u{3000}\u{301}\u{e000}"),
            (&String::from_utf8_lossy(b"a\xff\xc3"), "a\u{fffd}\u{fffd}"),
        ] {
            assert_eq!(excerpt(text, 1000), expected);
            let quoted = expected.replace("\\c", r"\\c").replace('"', r#"\""#);
            assert_eq!(escape(text).to_string(), quoted);
        }
    }

    #[test]
    fn an_excerpt_is_cut_at_its_bytes() {
        for (text, bytes_max, expected) in [
            ("123456", 6, "123456"),
            ("1234567", 6, "123…"),
            ("12éé", 6, "12éé"),
            ("12ééé", 6, "12…"),
            ("\n\n\n", 6, r"\n\n\n"),
            ("1\u{202e}", 9, r"1\u{202e}"),
            ("1\u{202e}", 8, "1…"),
            ("1234", 3, "…"),
            ("", 3, ""),
        ] {
            assert_eq!(excerpt(text, bytes_max), expected, "{text:?}");
        }
    }

    #[test]
    fn hex_is_lower_case_and_padded() {
        assert_eq!(hex(&[0, 0x0f, 0xa5, 0xff]), "000fa5ff");
    }

    #[test]
    fn decimals_are_digits_alone() {
        for (digits, number) in [
            ("0", Some(0)),
            ("007", Some(7)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("", None),
            ("+5", None),
            ("-0", None),
            (" 5", None),
            ("5_0", None),
            ("\u{664}", None),
        ] {
            assert_eq!(decimal(digits.as_bytes()), number, "{digits:?}");
        }
        assert_eq!(decimal(b"5\xff"), None);
    }

    #[test]
    fn token_bytes_are_those_of_rfc_9110() {
        let ours: Vec<u8> = (0..=255).filter(|byte| is_token_byte(*byte)).collect();
        let mut theirs = b"!#$%&'*+-.^_`|~".to_vec();
        theirs.extend((b'0'..=b'9').chain(b'A'..=b'Z').chain(b'a'..=b'z'));
        theirs.sort_unstable();
        assert_eq!(ours, theirs);
    }

    #[test]
    fn role_names_are_no_paths() {
        for (name, is_one) in [
            ("Role_1.a-b", true),
            ("...", true),
            ("", false),
            (".", false),
            ("..", false),
            ("a/b", false),
            ("a b", false),
            ("ä", false),
        ] {
            assert_eq!(is_role_name(name), is_one, "{name:?}");
        }
        assert!(is_role_name(&"a".repeat(64)) && !is_role_name(&"a".repeat(65)));
    }
}
