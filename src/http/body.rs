//! Bodies of responses: RFC 9112 sections 6 and 7, incremental.

#![warn(clippy::indexing_slicing)]

use zeroize::Zeroizing;

use super::error::ResponseError;
use crate::text::is_token_byte;

/// Most bytes of chunk extensions and trailers together that are read and thrown away in one body.
pub(crate) const SKIPPED_BYTES_MAX: usize = 8 * 1024;

/// Most hex digits of a chunk's size, leading zeros included: what 64 bits need.
const SIZE_DIGITS_MAX: u8 = 16;

/// First allocation in bytes for a body of unknown length.
const ALLOC_BYTES_MIN: usize = 4 * 1024;

/// How the end of a body is told: RFC 9112 section 6.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// `Content-Length`, or a status that has no body (0).
    Length(usize),
    /// `Transfer-Encoding: chunked`.
    Chunked,
    /// By the end of the connection.
    UntilClose,
}

/// A body that is being received. Its bytes are wiped on drop, and wherever they lay while it grew.
pub(crate) struct Body {
    bytes: Zeroizing<Vec<u8>>,
    bytes_max: usize,
    /// Bytes of extensions and trailers that may still come.
    skip_left: usize,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// `Content-Length` or the current chunk: this many bytes to come, more than none.
    Data {
        left: usize,
        then: AfterData,
    },
    UntilClose,
    Chunk(ChunkState),
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AfterData {
    Done,
    ChunkEnd,
}

/// Where in the chunked coding (RFC 9112 section 7.1) the next byte stands; data is apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChunkState {
    Size {
        size: usize,
        digits: u8,
    },
    /// White space after the size: only an extension may follow.
    SpaceAfterSize {
        size: usize,
    },
    Extension {
        size: usize,
    },
    SizeLf {
        size: usize,
    },
    DataCr,
    DataLf,
    /// At the start of a trailer line, or of the empty one that ends the body.
    TrailerStart,
    TrailerName,
    TrailerValue,
    TrailerLf,
    LastLf,
}

impl Body {
    /// A body of at most `bytes_max` bytes, none of which has come.
    /// Errors: [`ResponseError::BodyTooLarge`] if a longer one is announced.
    pub(crate) fn new(framing: Framing, bytes_max: usize) -> Result<Body, ResponseError> {
        let (state, capacity) = match framing {
            Framing::Length(0) => (State::Done, 0),
            Framing::Length(left) if left > bytes_max => {
                return Err(ResponseError::BodyTooLarge { bytes_max });
            }
            Framing::Length(left) => (State::Data { left, then: AfterData::Done }, left),
            Framing::Chunked => (State::Chunk(ChunkState::Size { size: 0, digits: 0 }), 0),
            Framing::UntilClose => (State::UntilClose, 0),
        };
        let bytes = Zeroizing::new(Vec::with_capacity(capacity));
        Ok(Body { bytes, bytes_max, skip_left: SKIPPED_BYTES_MAX, state })
    }

    /// Takes what belongs to the body off the front of `input`; gives back the rest. There is a rest only
    /// if the body is complete.
    /// Errors: what is wrong with the body. It is of no use any more then.
    pub(crate) fn feed<'a>(&mut self, mut input: &'a [u8]) -> Result<&'a [u8], ResponseError> {
        loop {
            match self.state {
                State::Done => return Ok(input),
                State::UntilClose => {
                    self.append(input)?;
                    return Ok(&[]);
                }
                State::Data { .. } if input.is_empty() => return Ok(input),
                State::Data { left, then } => {
                    let (data, rest) = input.split_at(left.min(input.len()));
                    self.append(data)?;
                    input = rest;
                    self.state = match (left - data.len(), then) {
                        (0, AfterData::Done) => State::Done,
                        (0, AfterData::ChunkEnd) => State::Chunk(ChunkState::DataCr),
                        (left, then) => State::Data { left, then },
                    };
                }
                State::Chunk(at) => {
                    let Some((&byte, rest)) = input.split_first() else { return Ok(input) };
                    input = rest;
                    self.state = self.next_in_chunk(at, byte)?;
                }
            }
        }
    }

    /// Whether nothing more belongs to the body. Never so, before [`Body::on_eof`], if the end of the
    /// connection tells its end.
    pub(crate) fn is_complete(&self) -> bool {
        self.state == State::Done
    }

    /// The connection has ended.
    /// Errors: [`ResponseError::Truncated`] if the body has not.
    pub(crate) fn on_eof(&mut self) -> Result<(), ResponseError> {
        match self.state {
            State::Done => Ok(()),
            State::UntilClose => {
                self.state = State::Done;
                Ok(())
            }
            State::Data { .. } | State::Chunk(_) => Err(ResponseError::Truncated),
        }
    }

    /// The bytes that have come.
    pub(crate) fn into_bytes(self) -> Zeroizing<Vec<u8>> {
        self.bytes
    }

    fn next_in_chunk(&mut self, at: ChunkState, byte: u8) -> Result<State, ResponseError> {
        use ChunkState as At;
        let next = match (at, byte) {
            (At::Size { size, digits }, _) if byte.is_ascii_hexdigit() => {
                if digits == SIZE_DIGITS_MAX {
                    return Err(ResponseError::BadChunk);
                }
                At::Size { size: self.with_digit(size, byte)?, digits: digits + 1 }
            }
            (At::Size { digits: 0, .. }, _) => return Err(ResponseError::BadChunk),
            (At::Size { size, .. } | At::SpaceAfterSize { size }, b' ' | b'\t') => {
                self.skip()?;
                At::SpaceAfterSize { size }
            }
            (At::Size { size, .. } | At::SpaceAfterSize { size }, b';') => {
                self.skip()?;
                At::Extension { size }
            }
            (At::Size { size, .. } | At::Extension { size }, b'\r') => At::SizeLf { size },
            (At::Extension { .. } | At::TrailerValue, _) if is_field_byte(byte) => {
                self.skip()?;
                at
            }
            (At::SizeLf { size: 0 } | At::TrailerLf, b'\n') => At::TrailerStart,
            (At::SizeLf { size }, b'\n') => {
                return Ok(State::Data { left: size, then: AfterData::ChunkEnd });
            }
            (At::DataCr, b'\r') => At::DataLf,
            (At::DataLf, b'\n') => At::Size { size: 0, digits: 0 },
            (At::TrailerStart, b'\r') => At::LastLf,
            (At::TrailerStart | At::TrailerName, _) if is_token_byte(byte) => {
                self.skip()?;
                At::TrailerName
            }
            (At::TrailerName, b':') => {
                self.skip()?;
                At::TrailerValue
            }
            (At::TrailerValue, b'\r') => At::TrailerLf,
            (At::LastLf, b'\n') => return Ok(State::Done),
            _ => return Err(ResponseError::BadChunk),
        };
        Ok(State::Chunk(next))
    }

    /// The chunk's size with one more hex digit, refused as soon as the body would be too long.
    fn with_digit(&self, size: usize, digit: u8) -> Result<usize, ResponseError> {
        let too_large = ResponseError::BodyTooLarge { bytes_max: self.bytes_max };
        let digit = char::from(digit).to_digit(16).ok_or(ResponseError::BadChunk)?;
        let digit = usize::try_from(digit).map_err(|_| too_large)?;
        let size = size.checked_mul(16).and_then(|size| size.checked_add(digit)).ok_or(too_large)?;
        if size > self.bytes_max - self.bytes.len() { Err(too_large) } else { Ok(size) }
    }

    fn skip(&mut self) -> Result<(), ResponseError> {
        self.skip_left = self.skip_left.checked_sub(1).ok_or(ResponseError::SkippedTooLarge)?;
        Ok(())
    }

    /// Appends `more`. Grows by moving to a new allocation, and the old one is wiped as it is dropped: a
    /// `Vec` that grows by itself frees it as it is.
    fn append(&mut self, more: &[u8]) -> Result<(), ResponseError> {
        let len = self.bytes.len().saturating_add(more.len());
        if len > self.bytes_max {
            return Err(ResponseError::BodyTooLarge { bytes_max: self.bytes_max });
        }
        if len > self.bytes.capacity() {
            let doubled = self
                .bytes
                .capacity()
                .saturating_mul(2)
                .clamp(ALLOC_BYTES_MIN, self.bytes_max.max(ALLOC_BYTES_MIN));
            let mut larger = Zeroizing::new(Vec::with_capacity(doubled.max(len)));
            larger.extend_from_slice(&self.bytes);
            self.bytes = larger;
        }
        self.bytes.extend_from_slice(more);
        Ok(())
    }
}

/// What a field value or a chunk extension may hold: `HTAB`, `SP`, `VCHAR`, `obs-text`.
const fn is_field_byte(byte: u8) -> bool {
    byte == b'\t' || (byte >= b' ' && byte != 0x7f)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES_MAX: usize = 40;

    /// Body and rest, fed in pieces of `step` bytes. An empty rest and `complete == false`: more to come.
    fn run(framing: Framing, input: &[u8], step: usize) -> Result<(Vec<u8>, Vec<u8>, bool), ResponseError> {
        let mut body = Body::new(framing, BYTES_MAX)?;
        let mut rest = Vec::new();
        for piece in input.chunks(step) {
            rest.extend_from_slice(body.feed(piece)?);
        }
        let complete = body.is_complete();
        Ok((body.into_bytes().to_vec(), rest, complete))
    }

    #[test]
    fn complete_bodies_in_any_pieces() {
        for (framing, input, body, rest) in [
            (Framing::Length(0), "", "", ""),
            (Framing::Length(0), "x", "", "x"),
            (Framing::Length(5), "hello", "hello", ""),
            (Framing::Length(5), "hello more", "hello", " more"),
            (Framing::Chunked, "0\r\n\r\n", "", ""),
            (Framing::Chunked, "5\r\nhello\r\n0\r\n\r\nmore", "hello", "more"),
            (Framing::Chunked, "1\r\nh\r\n004\r\nello\r\n000\r\n\r\n", "hello", ""),
            (
                Framing::Chunked,
                "A\r\n0123456789\r\nb\r\n0123456789a\r\n0\r\n\r\n",
                "01234567890123456789a",
                "",
            ),
            (Framing::Chunked, "2;a=\"b;\u{e9}\"\r\n\r\n\r\n0 ;x\r\n\r\n", "\r\n", ""),
            (Framing::Chunked, "1\r\nh\r\n0\r\nX-A: b c\r\ny:\r\n\r\n.", "h", "."),
            (
                Framing::Chunked,
                "28\r\n0123456789012345678901234567890123456789\r\n0\r\n\r\n",
                "0123456789012345678901234567890123456789",
                "",
            ),
        ] {
            for step in [1, 2, 3, 7, 1000] {
                let expected = Ok((body.into(), rest.into(), true));
                assert_eq!(run(framing, input.as_bytes(), step), expected, "{input:?} by {step}");
            }
        }
    }

    #[test]
    fn malformed_bodies_in_any_pieces() {
        use ResponseError::{BadChunk, SkippedTooLarge};
        const TOO_LARGE: ResponseError = ResponseError::BodyTooLarge { bytes_max: BYTES_MAX };
        let long_extension = format!("1;{}\r\nh\r\n0\r\n\r\n", "x".repeat(SKIPPED_BYTES_MAX));
        let long_trailer = format!("0\r\nx:{}\r\n\r\n", "x".repeat(SKIPPED_BYTES_MAX));
        let many_chunks = "1;abc\r\nh\r\n".repeat(BYTES_MAX) + "1\r\n";
        for (framing, input, error) in [
            (Framing::Length(BYTES_MAX + 1), "", TOO_LARGE),
            (Framing::Length(usize::MAX), "", TOO_LARGE),
            (Framing::UntilClose, "01234567890123456789012345678901234567890", TOO_LARGE),
            (Framing::Chunked, "29\r\n", TOO_LARGE),
            (Framing::Chunked, "1\r\nh\r\n28\r\n", TOO_LARGE),
            (Framing::Chunked, "10000000000000005\r\nhello\r\n0\r\n\r\n", TOO_LARGE),
            (Framing::Chunked, "ffffffffffffffff\r\n", TOO_LARGE),
            (Framing::Chunked, "00000000000000005\r\nhello\r\n0\r\n\r\n", BadChunk),
            (Framing::Chunked, "\r\n", BadChunk),
            (Framing::Chunked, ";a\r\n", BadChunk),
            (Framing::Chunked, " 5\r\nhello\r\n", BadChunk),
            (Framing::Chunked, "+5\r\nhello\r\n", BadChunk),
            (Framing::Chunked, "-5\r\nhello\r\n", BadChunk),
            (Framing::Chunked, "0x5\r\nhello\r\n", BadChunk),
            (Framing::Chunked, "5g\r\nhello\r\n", BadChunk),
            (Framing::Chunked, "5 \r\nhello\r\n", BadChunk),
            (Framing::Chunked, "5 5\r\nhello\r\n", BadChunk),
            (Framing::Chunked, "5\nhello\r\n", BadChunk),
            (Framing::Chunked, "5\rhello\r\n", BadChunk),
            (Framing::Chunked, "5;a\n", BadChunk),
            (Framing::Chunked, "5;a\rb\r\n", BadChunk),
            (Framing::Chunked, "5;a\0\r\n", BadChunk),
            (Framing::Chunked, "5\0\r\n", BadChunk),
            (Framing::Chunked, "5\r\nhello!", BadChunk),
            (Framing::Chunked, "5\r\nhello\n", BadChunk),
            (Framing::Chunked, "5\r\nhello\r0", BadChunk),
            (Framing::Chunked, "0\r\n\n", BadChunk),
            (Framing::Chunked, "0\r\n\r\r", BadChunk),
            (Framing::Chunked, "0\r\n: b\r\n", BadChunk),
            (Framing::Chunked, "0\r\na : b\r\n", BadChunk),
            (Framing::Chunked, "0\r\na: b\r\n c\r\n", BadChunk),
            (Framing::Chunked, "0\r\nab\r\n", BadChunk),
            (Framing::Chunked, "0\r\na: \0\r\n", BadChunk),
            (Framing::Chunked, "0\r\na: b\n", BadChunk),
            (Framing::Chunked, &long_extension, SkippedTooLarge),
            (Framing::Chunked, &long_trailer, SkippedTooLarge),
            (Framing::Chunked, &many_chunks, TOO_LARGE),
        ] {
            for step in [1, 2, 5, 100_000] {
                let short: String = input.chars().take(40).collect();
                assert_eq!(run(framing, input.as_bytes(), step), Err(error), "{short:?} by {step}");
            }
        }
    }

    #[test]
    fn eof_completes_only_what_ends_by_it() {
        for (framing, input, at_eof) in [
            (Framing::UntilClose, "", Ok(())),
            (Framing::UntilClose, "hello", Ok(())),
            (Framing::Length(5), "hello", Ok(())),
            (Framing::Length(5), "hell", Err(ResponseError::Truncated)),
            (Framing::Length(5), "", Err(ResponseError::Truncated)),
            (Framing::Chunked, "0\r\n\r\n", Ok(())),
            (Framing::Chunked, "0\r\n\r", Err(ResponseError::Truncated)),
            (Framing::Chunked, "0\r\n", Err(ResponseError::Truncated)),
            (Framing::Chunked, "5\r\nhello\r\n", Err(ResponseError::Truncated)),
            (Framing::Chunked, "", Err(ResponseError::Truncated)),
        ] {
            let mut body = Body::new(framing, BYTES_MAX).unwrap();
            assert_eq!(body.feed(input.as_bytes()), Ok(&b""[..]));
            assert_eq!(body.on_eof(), at_eof, "{framing:?} {input:?}");
            assert_eq!(body.is_complete(), at_eof.is_ok());
        }
    }

    #[test]
    fn announced_length_is_allocated_once_and_exactly() {
        let mut body = Body::new(Framing::Length(30), BYTES_MAX).unwrap();
        let at = body.bytes.as_ptr();
        for _ in 0..30 {
            assert_eq!(body.feed(b"x"), Ok(&b""[..]));
        }
        let bytes = body.into_bytes();
        assert_eq!((bytes.as_ptr(), bytes.capacity(), bytes.len()), (at, 30, 30));
    }
}
