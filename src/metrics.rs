//! What the agent counts of its own work, and the text in which Prometheus reads it.
//!
//! Plain numbers in one struct of the loop's thread: counting is an addition at a known place. No label is
//! foreign text, so the number of series is fixed, and no secret's name is among them.

use crate::code::Code;
use std::fmt::{Display, Write as _};
use std::time::Duration;

/// `Content-Type` of [`Metrics::render`]'s text.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The family of the latency histogram.
const DURATIONS: &str = "upstream_call_duration_seconds";
/// Upper bounds of the latency histogram's buckets, in microseconds, and as they are written.
const BUCKETS: [(u64, &str); 11] = [
    (5_000, "0.005"),
    (10_000, "0.01"),
    (25_000, "0.025"),
    (50_000, "0.05"),
    (100_000, "0.1"),
    (250_000, "0.25"),
    (500_000, "0.5"),
    (1_000_000, "1"),
    (2_500_000, "2.5"),
    (5_000_000, "5"),
    (10_000_000, "10"),
];

/// An enum with a label for each of its variants, and the list of them in their order.
macro_rules! labelled {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $label:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum $name { $($(#[$variant_doc])* $variant,)* }

        impl $name {
            /// All of them, in their order.
            pub(crate) const ALL: &[$name] = &[$($name::$variant,)*];

            /// The value of its label `result`.
            pub(crate) const fn label(self) -> &'static str {
                match self { $($name::$variant => $label,)* }
            }
        }
    };
}

labelled! {
    /// What became of a request, but for failures that originate in the agent: those have a [`Code`].
    Outcome {
        Hit = "hit",
        Miss = "miss",
        Refresh = "refresh",
        Stale = "stale",
        /// KMS's own error, a 4xx but 429.
        KmsRefused = "kms_refused",
        KmsThrottled = "kms_throttled",
        /// KMS's own error, a 5xx.
        KmsFailed = "kms_failed",
        Ping = "ok",
        Metrics = "ok",
        Status = "ok",
    }
}

impl Outcome {
    /// The outcome of a failure that KMS tells.
    pub(crate) const fn of_kms_status(status: u16) -> Outcome {
        match status {
            429 => Outcome::KmsThrottled,
            500.. => Outcome::KmsFailed,
            _ => Outcome::KmsRefused,
        }
    }

    const fn route(self) -> &'static str {
        match self {
            Outcome::Ping => "ping",
            Outcome::Metrics => "metrics",
            Outcome::Status => "status",
            _ => "secret",
        }
    }
}

labelled! {
    /// What the cache had for a reader.
    CacheResult {
        Hit = "hit",
        /// A value past its TTL.
        Expired = "expired",
        /// A refusal that is remembered.
        Refused = "refused",
        Miss = "miss",
        /// Was not asked: `refreshNow`.
        Bypass = "bypass",
    }
}

labelled! {
    /// What a call to KMS came to.
    CallResult {
        Ok = "ok",
        /// A definite refusal of this secret.
        Refused = "refused",
        /// Too many calls of the account.
        Throttled = "throttled",
        /// KMS, or something before it, fails.
        Failed = "failed",
        /// Access key or security token refused.
        CredentialsRefused = "credentials_refused",
        /// The clocks differ too much.
        ClockSkew = "clock_skew",
        /// The signature is wrong.
        SignatureRefused = "signature_refused",
        /// No reply that KMS gives.
        Invalid = "invalid",
        /// No reply in time.
        Timeout = "timeout",
        Unreachable = "unreachable",
    }
}

/// The agent's counters since its start.
#[derive(Debug, Default)]
pub struct Metrics {
    requests: [u64; Outcome::ALL.len()],
    failures: [u64; Code::ALL.len()],
    lookups: [u64; CacheResult::ALL.len()],
    calls: [u64; CallResult::ALL.len()],
    /// By bucket, not cumulated; the last is for what is above all bounds.
    call_durations: [u64; BUCKETS.len() + 1],
    call_duration_sum_us: u64,
    /// Refreshes begun behind the scenes.
    pub(crate) refreshes: u64,
    /// Fetches of credentials that brought some, and that did not.
    pub(crate) credential_fetches: Fetches,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Fetches {
    pub(crate) ok: u64,
    pub(crate) failed: u64,
}

/// What became of clients' connections since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Connections {
    pub(crate) accepted: u64,
    /// Could not be accepted: no descriptor or no memory.
    pub(crate) accept_failures: u64,
    /// Closed at a deadline: the first byte, a head, a reply not read, or idle for too long.
    pub(crate) timed_out: u64,
    /// Closed to make room for others.
    pub(crate) displaced: u64,
}

/// What is measured at the moment of the question.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Gauges {
    /// Cached secrets, and their bytes.
    pub(crate) cached: (usize, usize),
    pub(crate) cached_max: (usize, usize),
    pub(crate) connections: Connections,
    pub(crate) connections_open: usize,
    pub(crate) connections_max: usize,
    /// KMS counts as down.
    pub(crate) circuit_open: bool,
    /// When the credentials end, seconds since 1970 (UTC).
    pub(crate) credentials_expire_unix_s: Option<i64>,
    /// When the agent started, seconds since 1970 (UTC).
    pub(crate) started_unix_s: i64,
}

impl Metrics {
    /// A request was answered.
    pub(crate) const fn count_request(&mut self, outcome: Outcome) {
        self.requests[outcome as usize] += 1;
    }

    /// A request was answered with a failure that originates in the agent.
    pub(crate) const fn count_failure(&mut self, code: Code) {
        self.failures[code as usize] += 1;
    }

    /// The cache was asked.
    pub(crate) const fn count_lookup(&mut self, lookup: CacheResult) {
        self.lookups[lookup as usize] += 1;
    }

    /// A call to KMS ended.
    pub(crate) fn count_call(&mut self, result: CallResult, took: Duration) {
        self.calls[result as usize] += 1;
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = BUCKETS.iter().position(|(bound_us, _)| us <= *bound_us).unwrap_or(BUCKETS.len());
        self.call_durations[bucket] += 1;
        self.call_duration_sum_us = self.call_duration_sum_us.saturating_add(us);
    }

    /// All of it in Prometheus' text format 0.0.4.
    pub(crate) fn render(&self, gauges: &Gauges) -> String {
        let mut text = Text(String::with_capacity(8 * 1024));
        text.family("build_info", "What is running; always 1.");
        text.sample("build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);

        text.family("requests_total", "Requests of clients, by who answered and what.");
        let replies =
            Outcome::ALL.iter().zip(self.requests).map(|(it, count)| (it.route(), it.label(), count));
        let route = |code: &Code| if code.is_at_gate() { "gate" } else { "secret" };
        let failures = Code::ALL.iter().zip(self.failures).map(|(it, count)| (route(it), it.label(), count));
        for (route, result, count) in replies.chain(failures) {
            text.sample("requests_total", &[("route", route), ("result", result)], count);
        }
        let lookups = CacheResult::ALL.iter().map(|it| it.label()).zip(self.lookups);
        text.by_result("cache_lookups_total", "What the cache had for readers of secrets.", lookups);
        let calls = CallResult::ALL.iter().map(|it| it.label()).zip(self.calls);
        text.by_result("upstream_calls_total", "Calls to KMS, by what they came to.", calls);
        self.render_durations(&mut text);
        let Fetches { ok, failed } = self.credential_fetches;
        let fetches = [("ok", ok), ("failed", failed)];
        text.by_result("credential_fetches_total", "Fetches and renewals of credentials.", fetches);

        for (name, help, value) in self.singles(gauges) {
            text.single(name, help, value);
        }
        if let Some(unix_s) = gauges.credentials_expire_unix_s {
            text.single("credential_expiry_timestamp_seconds", "When the newest credentials end.", unix_s);
        }
        let Text(mut text) = text;
        // A name that every process has, so without ours before it.
        let _ = write!(
            text,
            "# HELP process_start_time_seconds When the agent started.\n\
             # TYPE process_start_time_seconds gauge\n\
             process_start_time_seconds {}\n",
            gauges.started_unix_s
        );
        text
    }

    /// The families of one sample without labels: name, help, value.
    fn singles(&self, gauges: &Gauges) -> [(&'static str, &'static str, u64); 13] {
        let Connections { accepted, accept_failures, timed_out, displaced } = gauges.connections;
        let refused = self.failures[Code::ConnectionLimitExceeded as usize];
        let ((entries, bytes), (entries_max, bytes_max)) = (gauges.cached, gauges.cached_max);
        let is_open = gauges.circuit_open.into();
        [
            ("cache_refreshes_total", "Refreshes begun behind the scenes.", self.refreshes),
            ("cache_entries", "Secrets in the cache.", entries as u64),
            ("cache_max_entries", "CacheSize.", entries_max as u64),
            ("cache_bytes", "Bytes of the values in the cache.", bytes as u64),
            ("cache_max_bytes", "CacheBytes.", bytes_max as u64),
            ("connections", "Connections of clients that are open.", gauges.connections_open as u64),
            ("max_connections", "MaxConn.", gauges.connections_max as u64),
            ("connections_accepted_total", "Connections accepted.", accepted),
            ("connections_refused_total", "Requests told that MaxConn is reached (429).", refused),
            (
                "connections_timed_out_total",
                "Connections closed at a deadline, idle ones included.",
                timed_out,
            ),
            ("connections_displaced_total", "Connections closed to make room for others.", displaced),
            (
                "accept_failures_total",
                "Connections that could not be accepted: no descriptor or no memory.",
                accept_failures,
            ),
            ("upstream_circuit_open", "1 while KMS counts as down and only probes go out.", is_open),
        ]
    }

    fn render_durations(&self, text: &mut Text) {
        text.family(DURATIONS, "How long calls to KMS took, connecting included.");
        let mut below = 0;
        let bounds = BUCKETS.iter().map(|(_, bound)| *bound).chain(["+Inf"]);
        for (count, bound) in self.call_durations.iter().zip(bounds) {
            below += count;
            text.sample(format_args!("{DURATIONS}_bucket"), &[("le", bound)], below);
        }
        let sum_us = self.call_duration_sum_us;
        let sum = format_args!("{}.{:06}", sum_us / 1_000_000, sum_us % 1_000_000).to_string();
        text.sample(format_args!("{DURATIONS}_sum"), &[], sum);
        text.sample(format_args!("{DURATIONS}_count"), &[], below);
    }
}

/// The text while it is written. Each name gets the agent's prefix.
struct Text(String);

impl Text {
    /// The kind follows from the name: by Prometheus' rules counters alone end in `_total`.
    fn family(&mut self, name: &str, help: &str) {
        let kind = match name {
            DURATIONS => "histogram",
            name if name.ends_with("_total") => "counter",
            _ => "gauge",
        };
        let _ = write!(self.0, "# HELP kms_agent_{name} {help}\n# TYPE kms_agent_{name} {kind}\n");
    }

    fn sample(&mut self, name: impl Display, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.0, "kms_agent_{name}");
        for (number, (label, text)) in labels.iter().enumerate() {
            let open = if number == 0 { '{' } else { ',' };
            let _ = write!(self.0, "{open}{label}=\"{text}\"");
        }
        self.0 += if labels.is_empty() { " " } else { "} " };
        let _ = writeln!(self.0, "{value}");
    }

    fn single(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, help);
        self.sample(name, &[], value);
    }

    fn by_result(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (&'static str, u64)>) {
        self.family(name, help);
        for (result, count) in samples {
            self.sample(name, &[("result", result)], count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn lines(metrics: &Metrics, gauges: &Gauges) -> Vec<String> {
        metrics.render(gauges).lines().map(str::to_owned).collect()
    }

    #[test]
    fn each_counter_has_a_series_of_its_own() {
        for (at, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(*outcome as usize, at);
        }
        let mut metrics = Metrics::default();
        for (times, outcome) in Outcome::ALL.iter().enumerate() {
            (0..=times).for_each(|_| metrics.count_request(*outcome));
        }
        for (times, code) in Code::ALL.iter().enumerate() {
            (0..=times).for_each(|_| metrics.count_failure(*code));
        }
        for (times, lookup) in CacheResult::ALL.iter().enumerate() {
            (0..=times).for_each(|_| metrics.count_lookup(*lookup));
        }
        for (times, result) in CallResult::ALL.iter().enumerate() {
            (0..=times).for_each(|_| metrics.count_call(*result, Duration::ZERO));
        }
        let lines = lines(&metrics, &Gauges::default());
        for expected in [
            "kms_agent_requests_total{route=\"secret\",result=\"hit\"} 1",
            "kms_agent_requests_total{route=\"secret\",result=\"stale\"} 4",
            "kms_agent_requests_total{route=\"ping\",result=\"ok\"} 8",
            "kms_agent_requests_total{route=\"status\",result=\"ok\"} 10",
            "kms_agent_requests_total{route=\"secret\",result=\"UpstreamTimeout\"} 1",
            "kms_agent_requests_total{route=\"gate\",result=\"InvalidParameter\"} 15",
            "kms_agent_connections_refused_total 9",
            "kms_agent_cache_lookups_total{result=\"bypass\"} 5",
            "kms_agent_upstream_calls_total{result=\"ok\"} 1",
            "kms_agent_upstream_calls_total{result=\"unreachable\"} 10",
        ] {
            assert!(lines.iter().any(|line| line == expected), "{expected}: {lines:#?}");
        }
    }

    #[test]
    fn series_and_families_are_there_once_and_explained() {
        let metrics = Metrics::default();
        let lines = lines(&metrics, &Gauges { credentials_expire_unix_s: Some(7), ..Gauges::default() });
        let mut series = HashSet::new();
        let (mut helped, mut typed) = (HashSet::new(), HashSet::new());
        for line in &lines {
            let words: Vec<&str> = line.split(' ').collect();
            match words.as_slice() {
                ["#", "HELP", name, _, ..] => assert!(helped.insert(*name), "{line}"),
                ["#", "TYPE", name, "counter" | "gauge" | "histogram"] => {
                    assert!(helped.contains(name) && typed.insert(*name), "{line}");
                }
                [name, value] => {
                    assert!(series.insert(*name) && value.parse::<f64>().is_ok(), "{line}");
                    let family = name.split('{').next().unwrap_or_default();
                    let of_histogram =
                        ["_bucket", "_sum", "_count"].iter().find_map(|it| family.strip_suffix(it));
                    assert!(
                        typed.contains(family) || of_histogram.is_some_and(|it| typed.contains(it)),
                        "{line}"
                    );
                }
                _ => panic!("{line}"),
            }
        }
        assert_eq!(helped, typed);
        assert!(series.contains("kms_agent_credential_expiry_timestamp_seconds"));
    }

    #[test]
    fn without_credentials_there_is_no_expiry() {
        let text = Metrics::default().render(&Gauges::default());
        assert!(!text.contains("expiry"), "0 would be a date: an alert's arithmetic must not see it");
    }

    #[test]
    fn durations_add_up_in_buckets() {
        let mut metrics = Metrics::default();
        for ms in [5, 6, 10_000, 60_000] {
            metrics.count_call(CallResult::Ok, Duration::from_millis(ms));
        }
        let lines = lines(&metrics, &Gauges::default());
        let values: Vec<&str> = lines
            .iter()
            .filter_map(|it| it.strip_prefix("kms_agent_upstream_call_duration_seconds_"))
            .collect();
        assert_eq!(values.first(), Some(&"bucket{le=\"0.005\"} 1"), "a bound belongs to its bucket");
        assert_eq!(values.get(1), Some(&"bucket{le=\"0.01\"} 2"));
        assert_eq!(
            values.get(10..),
            Some(&["bucket{le=\"10\"} 3", "bucket{le=\"+Inf\"} 4", "sum 70.011000", "count 4"][..])
        );
    }
}
