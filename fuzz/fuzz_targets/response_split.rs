//! What KMS or the metadata service sends, in any pieces: the same response, with the same end, or the same error.
#![no_main]

use kms_agent::http::response::{Progress, ResponseError, ResponseParser};
use kms_agent_fuzz::splits;
use libfuzzer_sys::fuzz_target;

/// Small, so that inputs reach it.
const BODY_BYTES_MAX: usize = 512;

/// All that one can learn of a response.
#[derive(Debug, PartialEq)]
struct Outcome {
    /// Bytes that belong to it, if it ended before the connection.
    used: Option<usize>,
    started: bool,
    status: u16,
    body: Vec<u8>,
    date_unix_s: Option<i64>,
    retry_after_s: Option<u32>,
    keep_alive: bool,
}

fn outcome(pieces: &[&[u8]]) -> Result<Outcome, ResponseError> {
    let mut parser = ResponseParser::new(BODY_BYTES_MAX);
    let (mut fed, mut end) = (0, None);
    for piece in pieces {
        match parser.feed(piece)? {
            Progress::NeedMore => assert_eq!(end, None, "complete, and then not"),
            Progress::Done { used } => {
                assert!(end.is_none() || used == 0, "bytes taken after the end");
                end = end.or(Some(fed + used));
            }
        }
        fed += piece.len();
    }
    parser.on_eof()?;
    let started = parser.started();
    let response = parser.into_response();
    Ok(Outcome {
        used: end,
        started,
        status: response.status,
        body: response.body.to_vec(),
        date_unix_s: response.date_unix_s,
        retry_after_s: response.retry_after_s,
        keep_alive: response.keep_alive,
    })
}

fuzz_target!(|bytes: &[u8]| {
    let whole = outcome(&[bytes]);
    for pieces in splits(bytes) {
        assert_eq!(outcome(&pieces), whole);
    }
});
