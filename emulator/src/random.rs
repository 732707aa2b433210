//! Random names and values from the operating system.

use std::fmt::Write;

/// Fills `bytes`. Without a working random source an emulator is no use, and predictable values in a test
/// tool harm nobody: zeros are left in that case.
pub(crate) fn fill(bytes: &mut [u8]) {
    let _ = getrandom::getrandom(bytes);
}

/// `count` lower-case hex digits, `count` even.
pub(crate) fn hex(count: usize) -> String {
    let mut bytes = vec![0; count / 2];
    fill(&mut bytes);
    hex::encode(bytes)
}

/// A random UUID, the form of KMS's request ids.
pub(crate) fn uuid() -> String {
    let mut out = String::with_capacity(36);
    for (i, part) in [8, 4, 4, 4, 12].into_iter().enumerate() {
        let dash = if i == 0 { "" } else { "-" };
        // Writing to a String cannot fail.
        let _ = write!(out, "{dash}{}", hex(part));
    }
    out
}

/// `count` characters drawn evenly from `alphabet` (ASCII, at most 256 characters).
pub(crate) fn text(alphabet: &[u8], count: usize) -> String {
    // Bytes past the last whole multiple are drawn again, or the first characters would come more often.
    let fair = 256 / alphabet.len() * alphabet.len();
    let mut out = String::with_capacity(count);
    let mut draw = [0; 64];
    while out.len() < count {
        fill(&mut draw);
        let picks = draw.iter().map(|b| usize::from(*b)).filter(|b| *b < fair);
        let chars = picks.filter_map(|b| alphabet.get(b % alphabet.len())).map(|b| char::from(*b));
        out.extend(chars.take(count - out.len()));
    }
    out
}

/// Letters and digits.
pub(crate) fn alphanumeric(count: usize) -> String {
    text(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789", count)
}

/// A password as KMS makes it: 32 characters with capitals, small letters, digits and marks in it.
pub(crate) fn password() -> String {
    const CLASSES: [&[u8]; 4] =
        [b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"abcdefghijklmnopqrstuvwxyz", b"0123456789", b"!@#%^*-_=+"];
    let everything = CLASSES.concat();
    // One of each class, then anything: which position holds which class is no secret worth hiding here.
    let mut out: String = CLASSES.iter().map(|class| text(class, 1)).collect();
    out.push_str(&text(&everything, 32 - CLASSES.len()));
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn passwords_have_every_class_and_differ() {
        let (a, b) = (super::password(), super::password());
        assert_eq!(a.len(), 32);
        assert_ne!(a, b);
        for class in [char::is_uppercase, char::is_lowercase, char::is_numeric] {
            assert!(a.contains(class));
        }
        assert!(a.contains(|c: char| c.is_ascii_punctuation()));
    }
}
