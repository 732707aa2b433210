//! What a cached value is filed under.

/// The stage that KMS gives when none is asked for (`docs/kms-protocol.md`, section 1).
pub const STAGE_CURRENT: &str = "ACSCurrent";

/// A secret, and which of its versions: normalised, so that equal questions share one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyRef<'a> {
    /// Name or ARN, as the reader wrote it.
    pub id: &'a str,
    /// `VersionId`, if asked for.
    pub version_id: Option<&'a str>,
    /// `VersionStage`; [`STAGE_CURRENT`] where neither was asked for.
    pub version_stage: Option<&'a str>,
}

impl<'a> KeyRef<'a> {
    /// Normalises: no stage and no id means [`STAGE_CURRENT`].
    #[must_use]
    pub fn new(id: &'a str, version_id: Option<&'a str>, version_stage: Option<&'a str>) -> KeyRef<'a> {
        let version_stage = match (version_id, version_stage) {
            (None, None) => Some(STAGE_CURRENT),
            _ => version_stage,
        };
        KeyRef { id, version_id, version_stage }
    }

    /// The current version of a secret.
    #[must_use]
    pub fn current(id: &'a str) -> KeyRef<'a> {
        KeyRef::new(id, None, None)
    }

    /// A key of its own.
    #[must_use]
    pub fn to_owned(self) -> Key {
        let is_usual = self == KeyRef::current(self.id);
        Key {
            id: self.id.into(),
            version_id: self.version_id.map(Into::into),
            version_stage: self.version_stage.filter(|_| !is_usual).map(Into::into),
        }
    }
}

impl std::hash::Hash for KeyRef<'_> {
    /// What is usual in a key is left out: this runs at every hit.
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write(self.id.as_bytes());
        if let Some(version_id) = self.version_id {
            state.write(version_id.as_bytes());
        }
        if let Some(stage) = self.version_stage.filter(|stage| *stage != STAGE_CURRENT) {
            state.write(stage.as_bytes());
        }
    }
}

/// An owned [`KeyRef`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    id: Box<str>,
    version_id: Option<Box<str>>,
    /// `None` for the usual one, which is not worth a block of memory in every entry.
    version_stage: Option<Box<str>>,
}

impl std::hash::Hash for Key {
    /// As its borrowed form, so that a map of keys can be asked with that.
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.as_ref().hash(state);
    }
}

impl Key {
    /// The borrowed form.
    #[must_use]
    pub fn as_ref(&self) -> KeyRef<'_> {
        KeyRef::new(&self.id, self.version_id.as_deref(), self.version_stage.as_deref())
    }

    /// Bytes of text it holds.
    #[must_use]
    pub fn text_bytes(&self) -> usize {
        let len = |text: &Option<Box<str>>| text.as_ref().map_or(0, |text| text.len());
        self.id.len() + len(&self.version_id) + len(&self.version_stage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::hash::{Hash, Hasher};

    #[test]
    fn equal_questions_have_equal_keys() {
        assert_eq!(KeyRef::new("db", None, None), KeyRef::new("db", None, Some("ACSCurrent")));
        assert_ne!(KeyRef::new("db", Some("1"), None), KeyRef::new("db", Some("1"), Some("ACSCurrent")));
        assert_ne!(KeyRef::new("db", None, Some("ACSPrevious")), KeyRef::current("db"));
        for (id, stage) in
            [(None, None), (None, Some("ACSPrevious")), (Some("1"), None), (Some("1"), Some("ACSCurrent"))]
        {
            let key = KeyRef::new("db", id, stage);
            assert_eq!(key.to_owned().as_ref(), key);
        }
    }

    /// Collects what is hashed.
    #[derive(Default)]
    struct Hashed(Vec<u8>);

    impl Hasher for Hashed {
        fn write(&mut self, bytes: &[u8]) {
            self.0.extend_from_slice(bytes);
        }

        fn finish(&self) -> u64 {
            0
        }
    }

    #[test]
    fn the_hash_leaves_out_what_is_usual_and_nothing_else() {
        for (version_id, stage, expected) in [
            (None, None, "db"),
            (None, Some("ACSCurrent"), "db"),
            (None, Some("ACSPrevious"), "dbACSPrevious"),
            (Some("v1"), None, "dbv1"),
            (Some("v1"), Some("ACSPrevious"), "dbv1ACSPrevious"),
        ] {
            let key = KeyRef::new("db", version_id, stage);
            let mut hashed = [Hashed::default(), Hashed::default()];
            key.hash(&mut hashed[0]);
            key.to_owned().hash(&mut hashed[1]);
            assert_eq!(hashed.map(|it| String::from_utf8(it.0).unwrap()), [expected, expected]);
        }
    }

    #[test]
    fn the_usual_stage_takes_no_memory() {
        assert_eq!(KeyRef::current("db").to_owned().text_bytes(), 2);
        assert_eq!(KeyRef::new("db", Some("v1"), Some("ACSCurrent")).to_owned().text_bytes(), 14);
    }
}
