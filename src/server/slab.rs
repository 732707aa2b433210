//! Slots for connections, each with a generation, so that a token outlives nobody.

use crate::net::Token;

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    tenant: Option<T>,
}

/// Connections by token. Slots are numbered from `base`.
#[derive(Debug)]
pub(super) struct Slab<T> {
    base: u32,
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    len: usize,
}

impl<T> Slab<T> {
    pub(super) const fn new(base: u32) -> Slab<T> {
        Slab { base, slots: Vec::new(), free: Vec::new(), len: 0 }
    }

    /// Tenants, those taken out for a moment included.
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// A token for a new tenant; bring it in with [`Slab::put`], or give the slot up with
    /// [`Slab::vacate`].
    pub(super) fn reserve(&mut self) -> Token {
        self.len += 1;
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, tenant: None });
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        });
        let generation = self.slots.get(index as usize).map_or(0, |slot| slot.generation);
        Token { slot: self.base + index, generation }
    }

    /// The tenant moves in, or back in.
    pub(super) fn put(&mut self, token: Token, tenant: T) {
        if let Some(slot) = self.slot(token) {
            slot.tenant = Some(tenant);
        }
    }

    /// Takes the tenant out for a moment.
    pub(super) fn take(&mut self, token: Token) -> Option<T> {
        self.slot(token)?.tenant.take()
    }

    /// Its slot is free from now on, its token void.
    pub(super) fn vacate(&mut self, token: Token) {
        if let Some(slot) = self.slot(token) {
            // Stays below 2^31, so that no packed token is one of the loop's own names.
            slot.generation = (slot.generation + 1) & 0x7fff_ffff;
            slot.tenant = None;
            self.len -= 1;
            self.free.push(token.slot - self.base);
        }
    }

    pub(super) fn get(&self, token: Token) -> Option<&T> {
        let slot = self.slots.get(token.slot.checked_sub(self.base)? as usize)?;
        slot.tenant.as_ref().filter(|_| slot.generation == token.generation)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Token, &T)> {
        (self.base..).zip(&self.slots).filter_map(|(slot, it)| {
            let token = Token { slot, generation: it.generation };
            it.tenant.as_ref().map(|tenant| (token, tenant))
        })
    }

    /// A new token for the same tenant; the old one is void.
    pub(super) fn renew(&mut self, token: Token) -> Token {
        match self.slot(token) {
            Some(slot) => {
                slot.generation = (slot.generation + 1) & 0x7fff_ffff;
                Token { slot: token.slot, generation: slot.generation }
            }
            None => token,
        }
    }

    fn slot(&mut self, token: Token) -> Option<&mut Slot<T>> {
        let index = token.slot.checked_sub(self.base)? as usize;
        self.slots.get_mut(index).filter(|slot| slot.generation == token.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_token_reaches_nobody() {
        let mut slab = Slab::new(10);
        let first = slab.reserve();
        slab.put(first, 'a');
        assert_eq!((first.slot, slab.get(first)), (10, Some(&'a')));
        slab.vacate(first);
        let second = slab.reserve();
        slab.put(second, 'b');
        assert_eq!(second.slot, first.slot);
        assert_eq!(slab.get(first), None);
        assert_eq!((slab.take(first), slab.len()), (None, 1));
        slab.vacate(first);
        assert_eq!(slab.get(second), Some(&'b'));
        let third = slab.renew(second);
        assert_eq!((slab.get(second), slab.get(third)), (None, Some(&'b')));
        assert_eq!(slab.iter().collect::<Vec<_>>(), [(third, &'b')]);
    }
}
