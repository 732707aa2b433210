//! A client's bytes in any pieces: the request parser is asked anew as they come, and must not change its mind.
//!
//! What holds, and is checked for every prefix that is seen:
//! - a request is the same request however much follows it;
//! - a rejection stays one. It stays the same one too, but for `TargetTooLong`: that is said as soon as the limit
//!   is passed, whereas of a longer piece a fault behind the limit may be told. Either ends the connection.
#![no_main]

use kms_agent::http::request::{Parsed, Reject, header_room, parse};
use kms_agent_fuzz::splits;
use libfuzzer_sys::fuzz_target;

/// A verdict that can be compared.
#[derive(Debug, PartialEq)]
enum Verdict {
    NeedMore,
    Reject(Reject),
    Request(String, usize),
}

fn verdict(bytes: &[u8]) -> Verdict {
    let mut room = header_room();
    match parse(bytes, &mut room) {
        Parsed::NeedMore => Verdict::NeedMore,
        Parsed::Reject(reject) => Verdict::Reject(reject),
        Parsed::Request(request, used) => Verdict::Request(format!("{request:?}"), used),
    }
}

fuzz_target!(|bytes: &[u8]| {
    let whole = verdict(bytes);
    for pieces in splits(bytes) {
        let mut len = 0;
        for piece in pieces {
            len += piece.len();
            let early = verdict(&bytes[..len]);
            match &early {
                Verdict::NeedMore => continue,
                Verdict::Reject(Reject::TargetTooLong) => {
                    assert!(matches!(whole, Verdict::Reject(_)), "first too long, then {whole:?}");
                }
                Verdict::Request(..) | Verdict::Reject(_) => assert_eq!(early, whole, "after {len} bytes"),
            }
            // The server asks no further.
            break;
        }
        if whole == Verdict::NeedMore {
            assert_eq!(len, bytes.len(), "an end within what has none");
        }
    }
});
