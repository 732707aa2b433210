//! [`WipingAllocator`]: the binary's allocator, which wipes every block that is given back.
//!
//! What the agent knows to be secret it wipes itself ([`crate::secret`], [`crate::buf`]). This is for the copies
//! that it does not make: TLS plaintext in rustls, JSON being read, a growing string's old block.

#![allow(unsafe_code, reason = "an allocator cannot be written without")]

use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator, with blocks wiped before it has them back. A hit of the cache allocates nothing, so
/// serving costs no more than before.
#[derive(Debug)]
pub struct WipingAllocator;

// SAFETY: all blocks are System's, asked for and given back with the caller's own layout.
unsafe impl GlobalAlloc for WipingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that System wants.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: until System has it back the whole block is ours to write to.
        unsafe { block.write_bytes(0, layout.size()) };
        // Else the compiler sees that nobody reads the zeros, and leaves them out.
        zeroize::optimization_barrier(&block);
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }

    // Not System's realloc, which may move a block and leave the old one as it was: the trait's own goes through
    // alloc and dealloc.
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_that_grows_keeps_its_bytes() {
        let layout = Layout::from_size_align(8, 8).unwrap();
        // SAFETY: one block, with its own layout, not used after it is given back.
        unsafe {
            let block = WipingAllocator.alloc(layout);
            block.copy_from(b"12345678".as_ptr(), 8);
            let larger = WipingAllocator.realloc(block, layout, 64);
            assert_eq!(std::slice::from_raw_parts(larger, 8), b"12345678");
            let smaller = WipingAllocator.realloc(larger, Layout::from_size_align(64, 8).unwrap(), 4);
            assert_eq!(std::slice::from_raw_parts(smaller, 4), b"1234");
            WipingAllocator.dealloc(smaller, Layout::from_size_align(4, 8).unwrap());
        }
    }
}
