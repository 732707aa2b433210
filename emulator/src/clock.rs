//! The emulator's clock: real time plus offsets, so that tests can move it without waiting.

use std::time::{SystemTime, UNIX_EPOCH};
use time::{Date, Month, OffsetDateTime, PrimitiveDateTime, Time};

/// Two readings of one clock. `server` is what KMS believes the time to be (the `Date` header, the check of
/// `x-acs-date`); `life` additionally counts the seconds a test skipped and drives rotation, recovery
/// windows and the expiry of credentials. Were they one, skipping a week would refuse every signature.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Clock {
    pub(crate) offset_s: i64,
    pub(crate) advanced_s: i64,
}

impl Clock {
    /// Unix seconds as the server sees them.
    pub(crate) fn server(self) -> i64 {
        let real = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        i64::try_from(real).unwrap_or(i64::MAX).saturating_add(self.offset_s)
    }

    /// Unix seconds for everything that has a life: secrets and credentials.
    pub(crate) fn life(self) -> i64 {
        self.server().saturating_add(self.advanced_s)
    }
}

fn at(unix: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(unix).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// `2020-07-23T11:56:29Z`, the one format of the KMS and STS APIs.
pub(crate) fn iso8601(unix: i64) -> String {
    let t = at(unix);
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}Z",
        t.year(),
        u8::from(t.month()),
        t.day(),
        t.hour(),
        t.minute(),
        t.second()
    )
}

/// The reverse of [`iso8601`]; nothing but that exact shape is accepted.
pub(crate) fn parse_iso8601(text: &str) -> Option<i64> {
    let b = text.as_bytes();
    let shape = b.len() == 20
        && b.iter().enumerate().all(|(i, c)| match i {
            4 | 7 => *c == b'-',
            10 => *c == b'T',
            13 | 16 => *c == b':',
            19 => *c == b'Z',
            _ => c.is_ascii_digit(),
        });
    if !shape {
        return None;
    }
    let part = |from: usize, to: usize| text.get(from..to)?.parse::<u8>().ok();
    let month = Month::try_from(part(5, 7)?).ok()?;
    let date = Date::from_calendar_date(text.get(..4)?.parse().ok()?, month, part(8, 10)?).ok()?;
    let time = Time::from_hms(part(11, 13)?, part(14, 16)?, part(17, 19)?).ok()?;
    Some(PrimitiveDateTime::new(date, time).assume_utc().unix_timestamp())
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110 5.6.7) for the `Date` header.
pub(crate) fn http_date(unix: i64) -> String {
    let t = at(unix);
    let (weekday, month) = (t.weekday().to_string(), t.month().to_string());
    format!(
        "{:.3}, {:02} {:.3} {:04} {:02}:{:02}:{:02} GMT",
        weekday,
        t.day(),
        month,
        t.year(),
        t.hour(),
        t.minute(),
        t.second()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_go_there_and_back() {
        assert_eq!(iso8601(1_595_505_389), "2020-07-23T11:56:29Z");
        assert_eq!(parse_iso8601("2020-07-23T11:56:29Z"), Some(1_595_505_389));
        assert_eq!(http_date(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        for bad in [
            "",
            "2020-07-23T11:56:29",
            "2020-13-23T11:56:29Z",
            "2020-07-23 11:56:29Z",
            "2020-02-30T00:00:00Z",
        ] {
            assert_eq!(parse_iso8601(bad), None, "{bad}");
        }
    }
}
