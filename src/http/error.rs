//! What of a response is too much, and why one is not taken.

use std::fmt;

/// Longest head, status line and header fields together, in bytes.
pub const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Most header fields of a head.
pub const HEADERS_MAX: usize = 64;
/// Most interim (1xx) responses before the final one.
pub(super) const INTERIM_RESPONSES_MAX: u8 = 8;

/// Why the bytes are no response, or none that the agent takes. Names what is wrong, quotes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseError {
    /// Does not begin with `HTTP/1.`.
    NotHttp,
    /// The head breaks the grammar of RFC 9112; what exactly.
    BadHead(&'static str),
    /// The head is longer than [`HEAD_BYTES_MAX`].
    HeadTooLarge,
    /// More header fields than [`HEADERS_MAX`].
    TooManyHeaders,
    /// More 1xx responses than [`INTERIM_RESPONSES_MAX`].
    TooManyInterimResponses,
    /// 101 Switching Protocols, which nobody asked for.
    UnexpectedUpgrade,
    /// `Content-Length` is no number, too large a number, or several different ones.
    BadContentLength,
    /// A transfer coding other than `chunked` alone, or any in HTTP/1.0.
    BadTransferEncoding,
    /// Both `Transfer-Encoding` and `Content-Length`.
    TwoFramings,
    /// The chunked coding is malformed.
    BadChunk,
    /// Chunk extensions and trailers are longer than [`super::body::SKIPPED_BYTES_MAX`].
    SkippedTooLarge,
    /// The body is, or is announced to be, longer than this many bytes.
    BodyTooLarge {
        /// The limit that the parser was given.
        bytes_max: usize,
    },
    /// The connection ended before the response did.
    Truncated,
}

impl fmt::Display for ResponseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ResponseError::NotHttp => f.write_str("the server does not speak HTTP/1"),
            ResponseError::BadHead(what) => write!(f, "the head of the HTTP response is malformed: {what}"),
            ResponseError::HeadTooLarge => {
                write!(f, "the head of the HTTP response is over {HEAD_BYTES_MAX} bytes")
            }
            ResponseError::TooManyHeaders => {
                write!(f, "the HTTP response has over {HEADERS_MAX} header fields")
            }
            ResponseError::TooManyInterimResponses => {
                write!(f, "the server sent over {INTERIM_RESPONSES_MAX} interim (1xx) HTTP responses")
            }
            ResponseError::UnexpectedUpgrade => f.write_str(
                "the server switched to a protocol that the agent did not ask for (HTTP status 101)",
            ),
            ResponseError::BadContentLength => {
                f.write_str("the Content-Length of the HTTP response is malformed")
            }
            ResponseError::BadTransferEncoding => {
                f.write_str("the Transfer-Encoding of the HTTP response is not supported")
            }
            ResponseError::TwoFramings => {
                f.write_str("the HTTP response has both Transfer-Encoding and Content-Length")
            }
            ResponseError::BadChunk => f.write_str("the chunked body of the HTTP response is malformed"),
            ResponseError::SkippedTooLarge => {
                f.write_str("the chunk extensions or trailers of the HTTP response are too long")
            }
            ResponseError::BodyTooLarge { bytes_max } => {
                write!(f, "the body of the HTTP response is over {bytes_max} bytes")
            }
            ResponseError::Truncated => {
                f.write_str("the server closed the connection before its HTTP response was complete")
            }
        }
    }
}

impl std::error::Error for ResponseError {}
