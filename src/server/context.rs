//! What both sides of the loop work with.

use crate::broker::Broker;
use crate::conn::inbound::READ_BYTES;
use crate::net::{Net, Token};
use crate::time::{Mono, Now};
use std::io;
use zeroize::Zeroize as _;

/// Bytes read from KMS and the metadata service in one go; clients' are fewer.
pub(super) const SCRATCH_BYTES: usize = 32 * 1024;
const _: () = assert!(READ_BYTES <= SCRATCH_BYTES);
/// The scratch for replies: a batch of them and the largest reply fit, so that it never grows and leaves an
/// unwiped copy behind. Memory is only taken for what is used of it.
pub(super) const OUT_BYTES: usize = 256 * 1024;

/// The sockets, the decisions, the tick's time, and the buffers to read into and to write to.
pub(super) struct Ctx<N> {
    pub(super) net: N,
    pub(super) broker: Broker,
    /// The time of this tick.
    pub(super) now: Now,
    /// No connection's deadline lies before this.
    pub(super) deadline_floor: Mono,
    /// Bytes of clients and of upstream are read into this, and wiped from it after.
    pub(super) scratch: Box<[u8]>,
    /// Replies to a client, from when they are written until they are sent.
    pub(super) out: Vec<u8>,
    /// How many bytes of it were written to in this tick.
    out_used: usize,
}

impl<N: Net> Ctx<N> {
    pub(super) fn new(net: N, broker: Broker) -> Ctx<N> {
        Ctx {
            now: net.now(),
            net,
            broker,
            deadline_floor: Mono::NEVER,
            scratch: vec![0; SCRATCH_BYTES].into_boxed_slice(),
            out: Vec::with_capacity(OUT_BYTES),
            out_used: 0,
        }
    }

    /// A connection's deadline is to be seen to.
    pub(super) fn wake_at(&mut self, deadline: Mono) {
        self.deadline_floor = self.deadline_floor.min(deadline);
    }

    /// Reads at most `bytes_max` bytes into the scratch.
    #[inline]
    pub(super) fn read(&mut self, token: Token, bytes_max: usize) -> io::Result<usize> {
        debug_assert!(bytes_max <= self.scratch.len(), "the scratch is in use");
        self.net.read(token, self.scratch.get_mut(..bytes_max).unwrap_or_default())
    }

    /// The replies are sent, or kept elsewhere. They are wiped at the end of the tick, once for all that were
    /// written over one another.
    pub(super) fn clear_out(&mut self) {
        debug_assert!(self.out.len() <= OUT_BYTES, "it has grown to {} bytes", self.out.len());
        self.out_used = self.out_used.max(self.out.len());
        self.out.clear();
    }

    /// Leaves no secret in the scratch for replies.
    pub(super) fn wipe_out(&mut self) {
        self.out.resize(self.out_used, 0);
        self.out.as_mut_slice().zeroize();
        self.out.clear();
        self.out_used = 0;
    }
}

/// What a read has put into the scratch.
pub(super) fn filled(scratch: &[u8], count: usize) -> &[u8] {
    debug_assert!(count <= scratch.len(), "no read gives more than there is room for");
    scratch.get(..count).unwrap_or_default()
}

/// Wipes what was read into the scratch. It outlives every request, so the compiler cannot leave this out.
pub(super) fn wipe(scratch: &mut [u8], count: usize) {
    if let Some(used) = scratch.get_mut(..count) {
        used.fill(0);
    }
}
