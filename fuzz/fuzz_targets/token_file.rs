//! Any file as a token's: what is read from it is what a client must send, and nothing else is.
#![no_main]

use kms_agent::broker::gate::{self, Route};
use kms_agent::http::request::{Parsed, header_room, parse};
use kms_agent::secret::Secret;
use kms_agent::token::{self, FILE_BYTES_MAX};
use kms_agent_fuzz::AGENT;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let carried = |bytes: &[u8]| bytes.iter().all(|byte| (b' '..=b'~').contains(byte));
    let Ok(token) = token::parse(bytes) else {
        let too_large = bytes.len() as u64 > FILE_BYTES_MAX;
        assert!(too_large || !carried(bytes.trim_ascii()), "refused for no reason");
        return;
    };
    assert!(bytes.len() as u64 <= FILE_BYTES_MAX && carried(token.expose()));
    let exposed = token.expose();
    assert_eq!(exposed, exposed.trim_ascii());
    assert!(exposed.is_empty() || bytes.windows(exposed.len()).any(|window| window == exposed));

    // White space around it makes no other token.
    let mut wider = b" \t".to_vec();
    wider.extend_from_slice(bytes);
    wider.extend_from_slice(b"\r\n");
    assert!(token::parse(&wider).map_or(wider.len() as u64 > FILE_BYTES_MAX, |again| again.ct_eq(exposed)));

    // A header can carry it, and it opens the door; an empty token, or one byte more or less, does not.
    assert_eq!(opens(&token, exposed), !exposed.is_empty());
    assert!(!opens(&token, &[exposed, b"x"].concat()));
    if let Some((_, shorter)) = exposed.split_last() {
        assert!(!opens(&token, shorter));
    }
    assert!(!opens(&token, b""));
});

/// Whether a client that shows `shown` gets past the gates of an agent whose token is `token`.
fn opens(token: &Secret, shown: &[u8]) -> bool {
    let mut head = b"GET /v1/db HTTP/1.1\r\nHost: localhost\r\nX-KMS-Token: ".to_vec();
    head.extend_from_slice(shown);
    head.extend_from_slice(b"\r\n\r\n");
    let mut room = header_room();
    let Parsed::Request(request, _) = parse(&head, &mut room) else {
        panic!("a value that a header can carry")
    };
    matches!(gate::pass(&request, &AGENT.servers[0], token, false), Ok(Route::Secret(_)))
}
