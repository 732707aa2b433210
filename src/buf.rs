//! [`Buf`]: a byte queue with a ceiling, wiped wherever it has been.
//!
//! Requests carry tokens and replies carry secrets, so no byte that passed through a buffer may stay in
//! freed memory.

use std::fmt;

use zeroize::Zeroizing;

/// Smallest allocation in bytes: a short request head fits without growing.
const ALLOC_BYTES_MIN: usize = 512;

/// A queue of bytes: written at the end, consumed at the front, never longer than its maximum.
///
/// Holds no memory until written to. It is wiped when it moves to a larger allocation and on drop; consumed bytes are
/// wiped at the latest then.
pub struct Buf {
    /// The allocation, all of it initialised: no byte of it escapes the wipe.
    bytes: Zeroizing<Box<[u8]>>,
    /// First byte held.
    start: usize,
    /// One past the last byte held; `start <= end <= bytes.len() <= bytes_max`.
    end: usize,
    bytes_max: usize,
}

/// The bytes do not fit; none of them was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

impl Buf {
    /// An empty buffer that will hold at most `bytes_max` bytes. Allocates nothing.
    pub(crate) fn with_max(bytes_max: usize) -> Buf {
        Buf { bytes: Zeroizing::default(), start: 0, end: 0, bytes_max }
    }

    /// Appends `more`, all or nothing.
    ///
    /// Moves the bytes held to the front if that makes room, and only then allocates: twice the old
    /// size, or what is needed, at most the maximum.
    /// Errors: [`Full`] if the buffer would hold more than its maximum.
    pub(crate) fn extend(&mut self, more: &[u8]) -> Result<(), Full> {
        let len = self.len().checked_add(more.len()).ok_or(Full)?;
        if len > self.bytes_max {
            return Err(Full);
        }
        if len > self.bytes.len() {
            self.grow(len);
        } else if more.len() > self.bytes.len() - self.end {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end = self.len();
            self.start = 0;
        }
        self.bytes[self.end..self.end + more.len()].copy_from_slice(more);
        self.end += more.len();
        Ok(())
    }

    /// Drops the first `count` bytes held. A `count` over the length is the caller's mistake: caught in debug
    /// builds, taken for all of them otherwise.
    pub(crate) fn consume(&mut self, count: usize) {
        debug_assert!(count <= self.len(), "consumed {count} of {} bytes", self.len());
        self.start += count.min(self.len());
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// The bytes held, oldest first.
    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// How many bytes are held.
    pub(crate) const fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether no byte is held.
    pub(crate) const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// How many more bytes [`Buf::extend`] will take.
    pub(crate) const fn room(&self) -> usize {
        self.bytes_max - self.len()
    }

    /// Size of the allocation in bytes: what the buffer costs.
    pub(crate) fn allocated(&self) -> usize {
        self.bytes.len()
    }

    /// Moves to an allocation of at least `len` bytes. The old one is wiped as it is dropped; a `Vec`
    /// that grows would free it as it is.
    fn grow(&mut self, len: usize) {
        let size = self.bytes.len().saturating_mul(2).max(ALLOC_BYTES_MIN).max(len).min(self.bytes_max);
        let mut larger = Zeroizing::new(vec![0; size].into_boxed_slice());
        let held = self.len();
        larger[..held].copy_from_slice(self.as_slice());
        self.bytes = larger;
        self.start = 0;
        self.end = held;
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buf").field("len", &self.len()).field("max", &self.bytes_max).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_no_memory_until_written() {
        let mut buf = Buf::with_max(4096);
        assert_eq!(buf.allocated(), 0);
        assert_eq!(buf.extend(b""), Ok(()));
        assert_eq!(buf.allocated(), 0);
        assert_eq!(buf.extend(b"abc"), Ok(()));
        assert!(buf.allocated() >= 3);
    }

    #[test]
    fn takes_all_or_nothing_up_to_the_maximum() {
        let mut buf = Buf::with_max(4);
        assert_eq!(buf.extend(b"abc"), Ok(()));
        assert_eq!(buf.extend(b"de"), Err(Full));
        assert_eq!(buf.as_slice(), b"abc");
        assert_eq!(buf.room(), 1);
        assert_eq!(buf.extend(b"d"), Ok(()));
        assert_eq!(buf.extend(b"e"), Err(Full));
        assert_eq!(buf.extend(b""), Ok(()));
        assert_eq!(buf.as_slice(), b"abcd");
        assert_eq!(Buf::with_max(0).extend(b"a"), Err(Full));
    }

    #[test]
    fn consumed_front_makes_room_without_growing() {
        let mut buf = Buf::with_max(4096);
        assert_eq!(buf.extend(&[1; ALLOC_BYTES_MIN]), Ok(()));
        buf.consume(ALLOC_BYTES_MIN - 2);
        assert_eq!(buf.extend(&[2; ALLOC_BYTES_MIN - 2]), Ok(()));
        assert_eq!(buf.allocated(), ALLOC_BYTES_MIN);
        assert_eq!(buf.as_slice()[..3], [1, 1, 2]);
        assert_eq!(buf.len(), ALLOC_BYTES_MIN);
    }

    #[test]
    fn behaves_like_a_plain_queue() {
        // A fixed walk through growth, compaction and emptiness, against the obvious model.
        let mut buf = Buf::with_max(3000);
        let mut model: Vec<u8> = Vec::new();
        let mut step = 1_u32;
        for _ in 0..20_000 {
            step = step.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let [kind, fill, high, low] = step.to_be_bytes();
            let amount = usize::from(u16::from_be_bytes([high, low])) % 700;
            if kind % 2 == 0 {
                let more = vec![fill; amount];
                if model.len() + amount > 3000 {
                    assert_eq!(buf.extend(&more), Err(Full));
                } else {
                    assert_eq!(buf.extend(&more), Ok(()));
                    model.extend(more);
                }
            } else {
                let count = amount.min(model.len());
                buf.consume(count);
                model.drain(..count);
            }
            assert_eq!(buf.as_slice(), model);
            assert!(buf.allocated() <= 3000);
        }
    }

    #[test]
    fn debug_shows_no_bytes() {
        let mut buf = Buf::with_max(64);
        assert_eq!(buf.extend(b"hush"), Ok(()));
        assert_eq!(format!("{buf:?}"), "Buf { len: 4, max: 64, .. }");
    }
}
