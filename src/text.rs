//! Rules about text that more than one module needs.
#![warn(clippy::indexing_slicing)]

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
