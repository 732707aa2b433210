//! `/status`: whether the agent can do its work, for `kms-agent status` and for people.

use crate::time::{Mono, Now};
use serde_json::{Value, json};
use std::fmt::Display;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Whether something works, since when, and what last failed.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// `None`: not tried yet.
    state: Option<(bool, Mono)>,
    last_error: Option<String>,
}

impl Health {
    /// It works.
    pub(super) fn works(&mut self, now: Mono) {
        self.set(true, now);
    }

    /// It does not, for this reason: no secret, nor a secret's name.
    pub(super) fn fails(&mut self, why: impl Display, now: Mono) {
        self.set(false, now);
        self.last_error = Some(why.to_string());
    }

    /// A try failed, and what there is still works.
    pub(super) fn notes(&mut self, why: impl Display) {
        self.last_error = Some(why.to_string());
    }

    /// Whether it works now, as far as one knows.
    pub(super) fn is_well(&self) -> bool {
        self.state.is_some_and(|(ok, _)| ok)
    }

    fn set(&mut self, ok: bool, now: Mono) {
        if self.state.is_none_or(|(was, _)| was != ok) {
            self.state = Some((ok, now));
        }
    }
}

/// What `/status` tells.
pub(super) struct Status<'a> {
    pub(super) pid: u32,
    pub(super) started: Now,
    /// Cached secrets, and their bytes.
    pub(super) cached: (usize, usize),
    pub(super) connections_open: usize,
    pub(super) connections_max: usize,
    pub(super) kms: &'a Health,
    pub(super) credentials: &'a Health,
    pub(super) credentials_expire_unix_s: Option<i64>,
    /// What the clock by which they end shows more than ours.
    pub(super) clock_offset_s: i64,
}

impl Status<'_> {
    pub(super) fn to_json(&self, now: Now) -> String {
        let (count, bytes) = self.cached;
        let kms = self.health(self.kms, now);
        let mut credentials = self.health(self.credentials, now);
        let expires = self.credentials_expire_unix_s;
        let on_their_clock = now.unix_s.saturating_add(self.clock_offset_s);
        if let Some(expires) = expires.filter(|at| self.credentials.is_well() && on_their_clock >= *at) {
            // Nobody has noticed yet.
            credentials["ok"] = json!(false);
            credentials["since"] = json!(rfc_3339(expires));
        }
        credentials["expires"] = json!(expires.and_then(rfc_3339));
        json!({
            "status": "Running",
            "version": env!("CARGO_PKG_VERSION"),
            "pid": self.pid,
            "uptime_seconds": now.mono.since(self.started.mono).as_secs(),
            "secrets": {"count": count, "bytes": bytes},
            "connections": {"open": self.connections_open, "max": self.connections_max},
            "kms": kms,
            "credentials": credentials,
        })
        .to_string()
    }

    fn health(&self, health: &Health, now: Now) -> Value {
        json!({
            "ok": health.state.map(|(ok, _)| ok),
            "since": health.state.and_then(|(_, since)| rfc_3339(self.unix_s(since, now))),
            "last_error": health.last_error,
        })
    }

    /// A moment on the wall clock: counted from the start, so that it is the same each time it is told, and
    /// moved along where the clock was set meanwhile.
    fn unix_s(&self, at: Mono, now: Now) -> i64 {
        let from_start = |at: Mono| {
            let seconds = at.since(self.started.mono).as_secs();
            self.started.unix_s.saturating_add(i64::try_from(seconds).unwrap_or(i64::MAX))
        };
        let set_by = now.unix_s.saturating_sub(from_start(now.mono));
        // Both clocks are cut to seconds here, which makes up to one.
        from_start(at).saturating_add(if set_by.abs() > 1 { set_by } else { 0 })
    }
}

/// Seconds since 1970 as RFC 3339 in UTC.
fn rfc_3339(unix_s: i64) -> Option<String> {
    OffsetDateTime::from_unix_timestamp(unix_s).ok()?.format(&Rfc3339).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Now {
        Now {
            mono: Mono::from_micros(seconds * 1_000_000),
            unix_s: 1_795_338_000 + i64::try_from(seconds).unwrap(),
        }
    }

    fn status<'a>(kms: &'a Health, credentials: &'a Health, expire: Option<i64>) -> Status<'a> {
        Status {
            pid: 123,
            started: at(0),
            cached: (3, 1234),
            connections_open: 2,
            connections_max: 800,
            kms,
            credentials,
            credentials_expire_unix_s: expire,
            clock_offset_s: 0,
        }
    }

    #[test]
    fn nothing_tried_yet() {
        let (kms, credentials) = (Health::default(), Health::default());
        let expected = json!({
            "status": "Running", "version": env!("CARGO_PKG_VERSION"), "pid": 123, "uptime_seconds": 12,
            "secrets": {"count": 3, "bytes": 1234}, "connections": {"open": 2, "max": 800},
            "kms": {"ok": null, "since": null, "last_error": null},
            "credentials": {"ok": null, "since": null, "expires": null, "last_error": null},
        });
        let got: Value = serde_json::from_str(&status(&kms, &credentials, None).to_json(at(12))).unwrap();
        assert_eq!(got, expected);
    }

    #[test]
    fn since_is_when_it_changed_and_the_last_error_stays() {
        let (mut kms, credentials) = (Health::default(), Health::default());
        let mut told = |change: &dyn Fn(&mut Health)| {
            change(&mut kms);
            let got: Value =
                serde_json::from_str(&status(&kms, &credentials, None).to_json(at(100))).unwrap();
            got["kms"].clone()
        };
        let since = |seconds| rfc_3339(at(seconds).unix_s);
        assert_eq!(since(0).unwrap(), "2026-11-22T09:00:00Z");
        assert_eq!(
            told(&|it| it.works(at(1).mono)),
            json!({"ok": true, "since": since(1), "last_error": null})
        );
        assert_eq!(
            told(&|it| it.works(at(2).mono)),
            json!({"ok": true, "since": since(1), "last_error": null})
        );
        told(&|it| it.fails("a", at(3).mono));
        assert_eq!(
            told(&|it| it.fails("b", at(4).mono)),
            json!({"ok": false, "since": since(3), "last_error": "b"})
        );
        assert_eq!(
            told(&|it| it.works(at(5).mono)),
            json!({"ok": true, "since": since(5), "last_error": "b"})
        );
        assert_eq!(told(&|it| it.notes("c")), json!({"ok": true, "since": since(5), "last_error": "c"}));
    }

    #[test]
    fn since_follows_a_wall_clock_that_was_set_and_nothing_else() {
        let (mut kms, credentials) = (Health::default(), Health::default());
        kms.works(at(10).mono);
        let since = |set_by| {
            let now = Now { unix_s: at(100).unix_s + set_by, ..at(100) };
            serde_json::from_str::<Value>(&status(&kms, &credentials, None).to_json(now)).unwrap()["kms"]
                ["since"]
                .clone()
        };
        for (set_by, expected_s) in [(0, 10), (1, 10), (-1, 10), (3600, 3610), (-7200, 10 - 7200)] {
            assert_eq!(since(set_by), json!(rfc_3339(at(0).unix_s + expected_s)), "{set_by}");
        }
    }

    #[test]
    fn credentials_end_without_anybody_looking() {
        let (kms, mut credentials) = (Health::default(), Health::default());
        credentials.works(at(1).mono);
        let end = at(50).unix_s;
        let told = |seconds| -> Value {
            let text = status(&kms, &credentials, Some(end)).to_json(at(seconds));
            serde_json::from_str::<Value>(&text).unwrap()["credentials"].clone()
        };
        let expires = rfc_3339(end);
        assert_eq!(
            told(49),
            json!({"ok": true, "since": rfc_3339(at(1).unix_s), "expires": expires, "last_error": null})
        );
        let status = Status { clock_offset_s: -3600, ..status(&kms, &credentials, Some(end)) };
        let ahead: Value = serde_json::from_str(&status.to_json(at(3649))).unwrap();
        assert_eq!(ahead["credentials"]["ok"], json!(true), "our clock is an hour ahead");
        assert_eq!(told(50), json!({"ok": false, "since": expires, "expires": expires, "last_error": null}));
    }
}
