//! What KMS or the metadata service sends, through the response parser and the body's decoding. A complete response
//! is read a second time in the plainest way there is, and both must see the same body and the same end.
#![no_main]

use kms_agent::http::response::{HEAD_BYTES_MAX, Progress, ResponseError, ResponseParser};
use libfuzzer_sys::fuzz_target;

/// Small, so that inputs reach it.
const BODY_BYTES_MAX: usize = 512;

fuzz_target!(|bytes: &[u8]| {
    let mut parser = ResponseParser::new(BODY_BYTES_MAX);
    match parser.feed(bytes) {
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert_eq!(parser.feed(b"HTTP/1.1 204 No\r\n\r\n"), Err(error), "an error stays");
            assert_eq!(parser.on_eof(), Err(error));
            assert_eq!(parser.into_response().status, 0);
        }
        Ok(Progress::Done { used }) => {
            assert!(used <= bytes.len());
            assert_eq!(parser.feed(b"more"), Ok(Progress::Done { used: 0 }));
            assert_eq!(parser.on_eof(), Ok(()));
            let response = parser.into_response();
            let (status, body) = naive(&bytes[..used], true);
            assert_eq!(response.status, status);
            assert_eq!(response.body.as_slice(), body);
            assert!((200..=599).contains(&status) && body.len() <= BODY_BYTES_MAX);
        }
        Ok(Progress::NeedMore) => match parser.on_eof() {
            Err(error) => {
                assert_eq!(error, ResponseError::Truncated);
                let response = parser.into_response();
                assert!(response.status == 0 && response.body.is_empty(), "half a body is given away");
            }
            Ok(()) => {
                let response = parser.into_response();
                let (status, body) = naive(bytes, false);
                assert_eq!((response.status, response.body.as_slice()), (status, body.as_slice()));
                assert!(!response.keep_alive, "what ends by the end of the connection cannot be kept");
            }
        },
    }
});

/// Status and body of a response that ends with `bytes`. `framed`: by its own framing.
fn naive(mut bytes: &[u8], framed: bool) -> (u16, Vec<u8>) {
    loop {
        let end = find(bytes, b"\r\n\r\n").expect("no end of the head") + 4;
        assert!(end <= HEAD_BYTES_MAX);
        let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
        let status: u16 = head[9..12].parse().expect("no status");
        bytes = &bytes[end..];
        if status < 200 {
            continue;
        }
        let value = |name: &str| {
            let mut values = head.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            values.next().map(|value| value.trim().to_owned())
        };
        let (length, coding) = (value("content-length"), value("transfer-encoding"));
        if status == 204 || status == 304 {
            assert!(framed && bytes.is_empty(), "a body where there is none");
        } else if coding.is_some() {
            assert!(framed && length.is_none(), "two framings");
            return (status, unchunked(bytes));
        } else if let Some(length) = length {
            let number = length.split(',').next().and_then(|number| number.trim().parse().ok());
            assert_eq!(number, Some(bytes.len()));
        } else {
            assert!(!framed, "an end that nothing tells");
        }
        return (status, bytes.to_vec());
    }
}

/// The content of a chunked body, whose end is the end of `bytes`.
fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut content = Vec::new();
    loop {
        let end = find(bytes, b"\r\n").expect("no end of the chunk's size");
        let line = std::str::from_utf8(&bytes[..end])
            .unwrap_or_else(|error| std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default());
        let digits = line.split([';', ' ', '\t']).next().unwrap_or_default();
        let size = usize::from_str_radix(digits, 16).expect("no size");
        bytes = &bytes[end + 2..];
        if size == 0 {
            break;
        }
        content.extend_from_slice(&bytes[..size]);
        assert_eq!(&bytes[size..size + 2], b"\r\n");
        bytes = &bytes[size + 2..];
    }
    // Trailers up to the empty line, and nothing after it.
    let end = if bytes.starts_with(b"\r\n") { 0 } else { find(bytes, b"\r\n\r\n").expect("no end") + 2 };
    assert_eq!(&bytes[end..], b"\r\n");
    content
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}
