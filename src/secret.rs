//! [`Secret`]: bytes that are wiped when they go, and that nothing prints by accident.

use std::fmt;

use subtle::ConstantTimeEq;
use zeroize::{Zeroize, Zeroizing};

/// Secret bytes: an access key's secret, a token, a security token.
///
/// Wiped on drop. There is no `Display`, no `PartialEq` (a `==` would leak by its timing) and
/// no `Clone`: a copy is made knowingly, with [`Secret::duplicate`].
pub struct Secret(Zeroizing<Box<[u8]>>);

impl Secret {
    /// The bytes. Whoever asks is answerable for where they go next.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// The bytes as text, or `None` if they are not UTF-8.
    pub(crate) fn expose_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }

    /// Whether the bytes are `other`, in a time that depends on the lengths only.
    #[must_use]
    pub fn ct_eq(&self, other: &[u8]) -> bool {
        // Eight bytes at a time: byte by byte a token costs a request more than its lookup.
        let (ours, our_rest) = self.0.as_chunks::<8>();
        let (theirs, their_rest) = other.as_chunks::<8>();
        if self.0.len() != other.len() {
            return false;
        }
        let same = ours.iter().zip(theirs).fold(our_rest.ct_eq(their_rest), |same, (ours, theirs)| {
            same & u64::from_ne_bytes(*ours).ct_eq(&u64::from_ne_bytes(*theirs))
        });
        same.into()
    }

    /// Whether there are no bytes at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A second copy, wiped on its own drop.
    pub(crate) fn duplicate(&self) -> Secret {
        Secret::from(self.expose())
    }
}

impl From<Vec<u8>> for Secret {
    /// Takes the allocation over if it fits exactly. Otherwise the bytes move to one that does and the
    /// old one is wiped, spare capacity included: `Vec::shrink_to_fit` may leave a copy behind, as the
    /// allocator is free to move the block.
    fn from(mut bytes: Vec<u8>) -> Secret {
        if bytes.len() == bytes.capacity() {
            return Secret(Zeroizing::new(bytes.into_boxed_slice()));
        }
        let exact = Secret::from(bytes.as_slice());
        bytes.zeroize();
        exact
    }
}

impl From<String> for Secret {
    /// As from the string's bytes.
    fn from(text: String) -> Secret {
        Secret::from(text.into_bytes())
    }
}

impl From<&[u8]> for Secret {
    /// Copies; wiping the original stays with its owner.
    fn from(bytes: &[u8]) -> Secret {
        Secret(Zeroizing::new(bytes.into()))
    }
}

impl From<&str> for Secret {
    /// Copies; wiping the original stays with its owner.
    fn from(text: &str) -> Secret {
        Secret::from(text.as_bytes())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equality_is_by_content_and_length() {
        let secret = Secret::from("token");
        for (other, equal) in
            [("token", true), ("tokeN", false), ("toke", false), ("tokens", false), ("", false)]
        {
            assert_eq!(secret.ct_eq(other.as_bytes()), equal, "{other:?}");
        }
        let long = Secret::from("0123456789abcdefXYZ");
        assert!(long.ct_eq(b"0123456789abcdefXYZ"));
        for at in 0..19 {
            let mut other = *b"0123456789abcdefXYZ";
            other[at] ^= 1;
            assert!(!long.ct_eq(&other), "byte {at}");
        }
        // "An empty token never matches" is the gate's rule, not equality's: callers ask is_empty.
        assert!(Secret::from("").ct_eq(b"") && Secret::from("").is_empty());
    }

    #[test]
    fn debug_shows_nothing() {
        assert_eq!(format!("{:?} {:#?}", Secret::from("hush"), Secret::from("")), "Secret(..) Secret(..)");
    }

    #[test]
    fn exact_allocation_is_taken_over() {
        let bytes = vec![7; 32];
        let at = bytes.as_ptr();
        assert_eq!(bytes.capacity(), 32);
        assert_eq!(Secret::from(bytes).expose().as_ptr(), at);
    }

    #[test]
    fn spare_capacity_is_given_up() {
        let mut bytes = Vec::with_capacity(64);
        bytes.extend_from_slice(b"abc");
        assert_eq!(Secret::from(bytes).expose(), b"abc");
        assert_eq!(Secret::from(String::from("def")).expose_str(), Some("def"));
        assert_eq!(Secret::from(vec![0xff]).expose_str(), None);
    }

    #[test]
    fn duplicate_is_its_own_copy() {
        let first = Secret::from("k");
        let second = first.duplicate();
        assert_ne!(first.expose().as_ptr(), second.expose().as_ptr());
        drop(first);
        assert!(second.ct_eq(b"k"));
    }
}
