//! `/status`: whether the agent can do its work, for `kms-agent status` and for people.

use super::health::{Condition, Health};
use crate::time::{Mono, Now};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// What `/status` tells.
pub(super) struct Status<'a> {
    pub(super) health: &'a Health,
    /// Cached secrets, and their bytes.
    pub(super) cached: (usize, usize),
    pub(super) connections_open: usize,
    pub(super) connections_max: usize,
    /// What the clock by which they end shows more than ours.
    pub(super) clock_offset_s: i64,
}

impl Status<'_> {
    pub(super) fn to_json(&self, now: Now) -> String {
        let (count, bytes) = self.cached;
        let kms = self.condition(&self.health.kms, now);
        let mut credentials = self.condition(&self.health.credentials, now);
        let expires = self.health.credentials_expire_unix_s;
        let on_their_clock = now.unix_s.saturating_add(self.clock_offset_s);
        if let Some(expires) = expires.filter(|at| self.health.credentials.is_well() && on_their_clock >= *at)
        {
            // They have ended, but no call has failed because of that yet.
            credentials["ok"] = json!(false);
            credentials["since"] = json!(rfc_3339(expires));
        }
        credentials["expires"] = json!(expires.and_then(rfc_3339));
        json!({
            "status": "Running",
            "version": env!("CARGO_PKG_VERSION"),
            "pid": self.health.pid,
            "uptime_seconds": now.mono.since(self.health.started.mono).as_secs(),
            "secrets": {"count": count, "bytes": bytes},
            "connections": {"open": self.connections_open, "max": self.connections_max},
            "kms": kms,
            "credentials": credentials,
        })
        .to_string()
    }

    fn condition(&self, condition: &Condition, now: Now) -> Value {
        json!({
            "ok": condition.state.map(|(ok, _)| ok),
            "since": condition.state.and_then(|(_, since)| rfc_3339(self.unix_s(since, now))),
            "last_error": condition.last_error,
        })
    }

    /// A moment on the wall clock: counted from the start, so that it is the same each time it is told, and
    /// moved along where the clock was set meanwhile.
    fn unix_s(&self, at: Mono, now: Now) -> i64 {
        let Now { mono: started, unix_s: started_unix_s } = self.health.started;
        let from_start = |at: Mono| {
            let seconds = at.since(started).as_secs();
            started_unix_s.saturating_add(i64::try_from(seconds).unwrap_or(i64::MAX))
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

    fn health() -> Health {
        let mut health = Health::new();
        (health.pid, health.started) = (123, at(0));
        health
    }

    fn told(health: &Health, clock_offset_s: i64, now: Now) -> Value {
        let (cached, connections_open, connections_max) = ((3, 1234), 2, 800);
        let status = Status { health, cached, connections_open, connections_max, clock_offset_s };
        serde_json::from_str(&status.to_json(now)).unwrap()
    }

    #[test]
    fn nothing_tried_yet() {
        let expected = json!({
            "status": "Running", "version": env!("CARGO_PKG_VERSION"), "pid": 123, "uptime_seconds": 12,
            "secrets": {"count": 3, "bytes": 1234}, "connections": {"open": 2, "max": 800},
            "kms": {"ok": null, "since": null, "last_error": null},
            "credentials": {"ok": null, "since": null, "expires": null, "last_error": null},
        });
        assert_eq!(told(&health(), 0, at(12)), expected);
    }

    #[test]
    fn since_is_when_it_changed_and_the_last_error_stays() {
        let mut health = health();
        let mut kms = |change: &dyn Fn(&mut Condition)| {
            change(&mut health.kms);
            told(&health, 0, at(100))["kms"].clone()
        };
        let since = |seconds| rfc_3339(at(seconds).unix_s);
        assert_eq!(since(0).unwrap(), "2026-11-22T09:00:00Z");
        let expected = json!({"ok": true, "since": since(1), "last_error": null});
        assert_eq!(kms(&|it| it.works(at(1).mono)), expected);
        assert_eq!(kms(&|it| it.works(at(2).mono)), expected);
        kms(&|it| it.fails("a", at(3).mono));
        let expected = json!({"ok": false, "since": since(3), "last_error": "b"});
        assert_eq!(kms(&|it| it.fails("b", at(4).mono)), expected);
        let expected = json!({"ok": true, "since": since(5), "last_error": "b"});
        assert_eq!(kms(&|it| it.works(at(5).mono)), expected);
    }

    #[test]
    fn since_follows_a_wall_clock_that_was_set_and_nothing_else() {
        let mut health = health();
        health.kms.works(at(10).mono);
        for (set_by, expected_s) in
            [(0, 10), (1, 10), (-1, 10), (2, 12), (-2, 8), (3600, 3610), (-7200, 10 - 7200)]
        {
            let now = Now { unix_s: at(100).unix_s + set_by, ..at(100) };
            let since = told(&health, 0, now)["kms"]["since"].clone();
            assert_eq!(since, json!(rfc_3339(at(0).unix_s + expected_s)), "{set_by}");
        }
    }

    #[test]
    fn credentials_end_without_anybody_looking() {
        let mut health = health();
        health.credentials.works(at(1).mono);
        health.credentials_expire_unix_s = Some(at(50).unix_s);
        let credentials =
            |clock_offset_s, seconds| told(&health, clock_offset_s, at(seconds))["credentials"].clone();
        let (since, expires) = (rfc_3339(at(1).unix_s), rfc_3339(at(50).unix_s));
        let well = json!({"ok": true, "since": since, "expires": expires, "last_error": null});
        assert_eq!(credentials(0, 49), well);
        assert_eq!(credentials(-3600, 3649), well, "our clock is an hour ahead");
        let ended = json!({"ok": false, "since": expires, "expires": expires, "last_error": null});
        assert_eq!(credentials(0, 50), ended);
    }
}
