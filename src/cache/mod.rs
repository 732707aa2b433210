//! The cache: values with a life, and refusals that are remembered for a moment.

pub mod key;
pub mod lru;

pub use key::{Key, KeyRef};

use crate::kms::reply::KmsError;
use crate::random::Random;
use crate::time::{Mono, Now};
use lru::Lru;
use std::rc::Rc;
use std::time::Duration;
use zeroize::Zeroizing;

/// How long KMS's definite refusal of a secret is remembered, so that a crash loop cannot burn the
/// quota.
pub const REFUSAL_LIFE: Duration = Duration::from_secs(5);
/// The same for a refusal of the agent where nothing is cached: an operator who has mended a policy or key is not kept
/// waiting.
pub const UNWELCOME_LIFE: Duration = Duration::from_secs(1);
/// Refusals remembered at a time, whatever the cache's own size.
const REFUSALS_MAX: usize = 1024;
/// A hot value is refreshed once this much of its life has passed, in per mille; a random part of the jitter
/// below is added, so that a fleet does not refresh in step.
const REFRESH_AT_PER_MILLE: u32 = 700;
/// The range of that jitter, in per mille of the life.
const REFRESH_JITTER_PER_MILLE: u32 = 100;

/// A reply body that several readers may be waiting for; wiped when the last one lets go.
pub type Body = Rc<Zeroizing<Vec<u8>>>;

/// A secret's value as KMS gave it.
#[derive(Debug)]
pub struct Value {
    /// KMS's reply, or what is kept of it.
    pub body: Body,
    /// When it is fresh.
    pub span: Span,
    /// When it is worth refreshing if it is hot; [`Mono::NEVER`] once that has begun.
    refresh_at: Mono,
    /// Read since the fetch that brought it: hot.
    read: bool,
}

/// From when to when a value is fresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// When KMS gave it.
    pub fetched: Mono,
    /// When its freshness ends.
    pub expires: Mono,
}

/// What the cache knows of a key.
#[derive(Debug)]
pub enum Lookup<'a> {
    /// A value to serve.
    Fresh {
        /// It.
        value: &'a Value,
        /// It is hot and nearly expired: fetch it anew behind the scenes.
        refresh: bool,
    },
    /// A value past its life and within the stale ceiling.
    Expired(&'a Value),
    /// KMS said no a moment ago.
    Refused(&'a Rc<KmsError>),
    /// Nothing.
    Absent,
}

/// How long values live.
#[derive(Clone, Copy, Debug)]
pub struct Lives {
    /// `TTLSeconds`.
    pub ttl: Duration,
    /// `MaxStaleSeconds`; zero where stale values are never served.
    pub max_stale: Duration,
}

#[derive(Debug)]
struct Refusal {
    error: Rc<KmsError>,
    until: Mono,
}

/// Values and refusals of a fixed capacity.
#[derive(Debug)]
pub struct Cache {
    lives: Lives,
    refresh_jitter_per_mille: u32,
    values: Lru<Value>,
    refusals: Lru<Refusal>,
    /// No hot value is due for a refresh before this.
    refresh_floor: Mono,
}

impl Cache {
    /// Holds `entries_max` values of `bytes_max` in all.
    #[must_use]
    pub fn new(entries_max: usize, bytes_max: usize, lives: Lives) -> Cache {
        Cache {
            lives,
            refresh_jitter_per_mille: REFRESH_JITTER_PER_MILLE,
            values: Lru::new(entries_max, bytes_max),
            refusals: Lru::new(REFUSALS_MAX, usize::MAX),
            refresh_floor: Mono::NEVER,
        }
    }

    /// Spreads refreshes over so much of a value's life, in per mille, instead of the usual tenth.
    pub fn set_refresh_jitter(&mut self, per_mille: u32) {
        self.refresh_jitter_per_mille = per_mille;
    }

    /// Looks a reader's key up, and counts as its use.
    pub fn lookup(&mut self, key: KeyRef<'_>, now: Mono) -> Lookup<'_> {
        // What is over goes first, before the borrow that is returned.
        if !self.refusals.is_empty() {
            if self.is_refused(key, now) {
                return self.refusals.peek(key).map_or(Lookup::Absent, |it| Lookup::Refused(&it.error));
            }
            self.refusals.remove(key);
        }
        if self.values.peek(key).is_some_and(|value| self.lives.is_dead(value, now)) {
            self.values.remove(key);
        }
        let Some(value) = self.values.touch(key) else { return Lookup::Absent };
        if now >= value.span.expires {
            return Lookup::Expired(value);
        }
        value.read = true;
        let refresh = now >= value.refresh_at;
        if refresh {
            value.refresh_at = Mono::NEVER;
        }
        self.refresh_floor = self.refresh_floor.min(value.refresh_at);
        Lookup::Fresh { value, refresh }
    }

    /// The value that may be served for `key` while KMS is failing, fresh or stale; not a use.
    #[must_use]
    pub fn servable(&self, key: KeyRef<'_>, now: Mono) -> Option<&Value> {
        self.values.peek(key).filter(|value| !self.lives.is_dead(value, now))
    }

    /// Whether KMS's refusal of this secret is remembered.
    #[must_use]
    pub fn is_refused(&self, key: KeyRef<'_>, now: Mono) -> bool {
        self.refusals.peek(key).is_some_and(|refusal| now < refusal.until)
    }

    /// Keeps a value that KMS has just given. `random` spreads refreshes.
    ///
    /// A rotation that KMS announces for a moment within the life ends the life there; until then a
    /// refresh could only bring the old value again, so it is not begun before. `now` is on KMS's clock.
    pub fn insert(
        &mut self,
        key: Key,
        body: Body,
        next_rotation_unix_s: Option<i64>,
        now: Now,
        random: &mut Random,
    ) -> Span {
        let jitter = random.up_to(u64::from(self.refresh_jitter_per_mille));
        self.refusals.remove(key.as_ref());
        let end = now.mono.after(self.lives.ttl);
        let rotation = next_rotation_unix_s
            .and_then(|at| u64::try_from(at.saturating_sub(now.unix_s)).ok())
            .filter(|ahead_s| *ahead_s > 0)
            .map(|ahead_s| now.mono.after(Duration::from_secs(ahead_s)))
            .filter(|rotation| *rotation < end);
        let (expires, refresh_at) = match rotation {
            Some(rotation) => (rotation, rotation),
            None => {
                let share = REFRESH_AT_PER_MILLE.saturating_add(u32::try_from(jitter).unwrap_or(0));
                (end, now.mono.after(self.lives.ttl * share / 1000))
            }
        };
        let span = Span { fetched: now.mono, expires };
        if self.lives.ttl.is_zero() {
            self.values.remove(key.as_ref());
        } else {
            let weight_bytes = body.len();
            self.values.insert(key, Value { body, span, refresh_at, read: false }, weight_bytes);
        }
        span
    }

    /// KMS refuses this secret: its value goes at once, the refusal stays for `life`.
    pub fn refuse(&mut self, key: Key, error: Rc<KmsError>, life: Duration, now: Mono) {
        self.values.remove(key.as_ref());
        let weight_bytes = key.text_bytes();
        self.refusals.insert(key, Refusal { error, until: now.after(life) }, weight_bytes);
    }

    /// When [`Cache::take_due_refreshes`] is worth calling.
    #[must_use]
    pub fn next_refresh(&self) -> Mono {
        self.refresh_floor
    }

    /// The keys of hot values whose refresh is due; each is given once.
    pub fn take_due_refreshes(&mut self, now: Mono) -> Vec<Key> {
        if now < self.refresh_floor {
            return Vec::new();
        }
        let is_due = |value: &Value| value.read && value.refresh_at <= now;
        let due: Vec<Key> =
            self.values.iter().filter(|(_, value)| is_due(value)).map(|(key, _)| key.clone()).collect();
        for key in &due {
            if let Some(value) = self.values.peek_mut(key.as_ref()) {
                value.refresh_at = Mono::NEVER;
            }
        }
        let hot = self.values.iter().filter(|(_, value)| value.read);
        self.refresh_floor = hot.map(|(_, value)| value.refresh_at).min().unwrap_or(Mono::NEVER);
        due
    }

    /// How many values there are, and their bytes.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        (self.values.len(), self.values.bytes())
    }

    /// The most of both that it holds.
    #[must_use]
    pub fn size_max(&self) -> (usize, usize) {
        self.values.limits()
    }

    /// Panics where a limit or a link is broken.
    #[cfg(any(test, debug_assertions))]
    pub fn check_invariants(&self) {
        self.values.check_invariants();
        self.refusals.check_invariants();
        for (key, value) in self.values.iter() {
            assert!(self.refusals.peek(key.as_ref()).is_none(), "a refused secret has no value");
            assert!(value.span.fetched <= value.span.expires);
        }
    }
}

impl Lives {
    fn is_dead(self, value: &Value, now: Mono) -> bool {
        now >= value.span.expires.after(self.max_stale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(100);

    fn at(seconds: u64) -> Now {
        Now {
            mono: Mono::from_micros(seconds * 1_000_000),
            unix_s: 1_000_000 + i64::try_from(seconds).unwrap(),
        }
    }

    fn cache(max_stale_s: u64) -> Cache {
        let lives = Lives { ttl: TTL, max_stale: Duration::from_secs(max_stale_s) };
        let mut cache = Cache::new(10, 1000, lives);
        cache.set_refresh_jitter(0);
        cache
    }

    fn db() -> KeyRef<'static> {
        KeyRef::current("db")
    }

    fn put(cache: &mut Cache, next_rotation_unix_s: Option<i64>, seconds: u64) {
        cache.insert(
            db().to_owned(),
            Rc::new(Zeroizing::new(b"{}".to_vec())),
            next_rotation_unix_s,
            at(seconds),
            &mut Random::from_seed(1),
        );
        cache.check_invariants();
    }

    fn see(cache: &mut Cache, seconds: u64) -> &'static str {
        match cache.lookup(db(), at(seconds).mono) {
            Lookup::Fresh { refresh: false, .. } => "fresh",
            Lookup::Fresh { refresh: true, .. } => "fresh, refresh",
            Lookup::Expired(_) => "expired",
            Lookup::Refused(_) => "refused",
            Lookup::Absent => "absent",
        }
    }

    #[test]
    fn a_life() {
        let mut cache = cache(50);
        put(&mut cache, None, 0);
        for (seconds, expected) in [
            (0, "fresh"),
            (69, "fresh"),
            (70, "fresh, refresh"),
            (71, "fresh"),
            (99, "fresh"),
            (100, "expired"),
        ] {
            assert_eq!(see(&mut cache, seconds), expected, "{seconds}");
        }
        assert!(cache.servable(db(), at(149).mono).is_some());
        assert!(cache.servable(db(), at(150).mono).is_none());
        assert_eq!((see(&mut cache, 150), cache.size()), ("absent", (0, 0)));
    }

    #[test]
    fn without_stale_it_ends_with_its_ttl() {
        let mut cache = cache(0);
        put(&mut cache, None, 0);
        assert_eq!((see(&mut cache, 69), see(&mut cache, 100)), ("fresh", "absent"));
    }

    #[test]
    fn only_what_was_read_is_refreshed_by_the_clock() {
        let mut cache = cache(50);
        put(&mut cache, None, 0);
        assert_eq!(cache.next_refresh(), Mono::NEVER);
        see(&mut cache, 1);
        assert_eq!(cache.next_refresh(), at(70).mono);
        assert!(cache.take_due_refreshes(at(69).mono).is_empty());
        assert_eq!(cache.take_due_refreshes(at(70).mono), [db().to_owned()]);
        assert!(cache.take_due_refreshes(at(71).mono).is_empty(), "given once");
        assert_eq!(see(&mut cache, 77), "fresh", "and not by a reader either");
    }

    #[test]
    fn a_rotation_ahead_ends_the_life() {
        for (rotation, expires_s) in
            [(None, 100), (Some(40), 40), (Some(100), 100), (Some(0), 100), (Some(-5), 100)]
        {
            let mut cache = cache(50);
            put(&mut cache, rotation.map(|seconds| at(0).unix_s + seconds), 0);
            assert_eq!(
                cache.servable(db(), at(0).mono).unwrap().span.expires,
                at(expires_s).mono,
                "{rotation:?}"
            );
        }
    }

    #[test]
    fn a_refusal_drops_the_value_and_is_forgotten() {
        let mut cache = cache(50);
        put(&mut cache, None, 0);
        let error = Rc::new(KmsError {
            status: 404,
            code: "Forbidden.ResourceNotFound".into(),
            message: String::new(),
            request_id: String::new(),
        });
        cache.refuse(db().to_owned(), Rc::clone(&error), REFUSAL_LIFE, at(1).mono);
        cache.check_invariants();
        assert!(cache.is_refused(db(), at(5).mono) && !cache.is_refused(db(), at(6).mono));
        assert!(!cache.is_refused(KeyRef::current("other"), at(5).mono));
        assert_eq!((see(&mut cache, 5), see(&mut cache, 6)), ("refused", "absent"));
        cache.refuse(db().to_owned(), error, REFUSAL_LIFE, at(10).mono);
        put(&mut cache, None, 11);
        assert_eq!(see(&mut cache, 11), "fresh");
    }

    #[test]
    fn a_ttl_of_zero_keeps_nothing() {
        let mut cache = Cache::new(10, 1000, Lives { ttl: Duration::ZERO, max_stale: TTL });
        put(&mut cache, None, 0);
        assert_eq!(see(&mut cache, 0), "absent");
    }

    #[test]
    fn refreshes_are_spread_over_a_tenth_of_the_life() {
        let cache = |jitter| {
            let mut cache = Cache::new(10, 1000, Lives { ttl: TTL, max_stale: TTL });
            if let Some(per_mille) = jitter {
                cache.set_refresh_jitter(per_mille);
            }
            cache
        };
        let body = Rc::new(Zeroizing::new(b"{}".to_vec()));
        let refreshes = |jitter, random: &mut Random| -> Vec<u64> {
            let mut cache = cache(jitter);
            let times = (0..1000).map(|_| {
                cache.insert(db().to_owned(), Rc::clone(&body), None, at(0), random);
                cache.values.peek(db()).unwrap().refresh_at.as_micros() / 100_000
            });
            times.collect()
        };
        let mut random = Random::from_seed(1);
        let times = refreshes(None, &mut random);
        assert_eq!((times.iter().min(), times.iter().max()), (Some(&700), Some(&800)));
        let times = refreshes(Some(10), &mut random);
        assert_eq!((times.iter().min(), times.iter().max()), (Some(&700), Some(&710)));
    }

    #[test]
    fn it_knows_its_size_and_limits() {
        let mut cache = cache(50);
        put(&mut cache, None, 0);
        assert_eq!((cache.size(), cache.size_max()), ((1, 2), (10, 1000)));
    }

    #[test]
    fn of_many_only_the_hot_that_are_due_are_refreshed() {
        let mut cache = cache(50);
        let mut random = Random::from_seed(1);
        for (id, seconds) in [("cold", 0), ("hot", 0), ("hot later", 5), ("hot much later", 50)] {
            let body = Rc::new(Zeroizing::new(b"{}".to_vec()));
            cache.insert(KeyRef::current(id).to_owned(), body, None, at(seconds), &mut random);
            if id.starts_with("hot") {
                cache.lookup(KeyRef::current(id), at(seconds).mono);
            }
        }
        assert_eq!(cache.next_refresh(), at(70).mono);
        assert_eq!(cache.take_due_refreshes(at(71).mono), [KeyRef::current("hot").to_owned()]);
        assert_eq!(cache.next_refresh(), at(75).mono);
        assert_eq!(cache.take_due_refreshes(at(75).mono), [KeyRef::current("hot later").to_owned()]);
        assert_eq!(cache.next_refresh(), at(120).mono);
    }

    #[test]
    fn a_rotation_at_the_end_of_the_life_does_not_hold_up_the_refresh() {
        for (rotation_s, seen) in [(99, "fresh"), (100, "fresh, refresh"), (101, "fresh, refresh")] {
            let mut cache = cache(50);
            put(&mut cache, Some(at(rotation_s).unix_s), 0);
            assert_eq!(see(&mut cache, 70), seen, "{rotation_s}");
        }
    }
}
