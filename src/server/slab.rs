//! Slots for connections, each with a generation, so that no token outlives its connection.

use crate::net::Token;
use crate::time::Mono;

/// Empty slots that are kept for the next tenants.
const SPARE_SLOTS: usize = 32;

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    /// Somebody's, also while the tenant is out for a moment.
    reserved: bool,
    tenant: Option<T>,
}

/// Connections by token. Slots are numbered from `base`.
#[derive(Debug)]
pub(super) struct Slab<T> {
    base: u32,
    slots: Vec<Slot<T>>,
    /// Free slots, the one to give out next last; those past the end are gone.
    free: Vec<u32>,
    len: usize,
    /// Of the token given last: one count for all slots, since slots come and go.
    generation: u32,
}

impl<T> Slab<T> {
    pub(super) const fn new(base: u32) -> Slab<T> {
        Slab { base, slots: Vec::new(), free: Vec::new(), len: 0, generation: 0 }
    }

    /// Tenants, those taken out for a moment included.
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// A token for a new tenant; bring it in with [`Slab::put`], or give the slot up with
    /// [`Slab::vacate`].
    pub(super) fn reserve(&mut self) -> Token {
        self.len += 1;
        let generation = self.next_generation();
        let index = self.free_slot();
        if let Some(slot) = self.slots.get_mut(index as usize) {
            (slot.generation, slot.reserved) = (generation, true);
        }
        Token { slot: self.base + index, generation }
    }

    fn free_slot(&mut self) -> u32 {
        while let Some(index) = self.free.pop() {
            if (index as usize) < self.slots.len() {
                return index;
            }
        }
        // Only now that none is listed, so that none is ever listed twice.
        self.slots.push(Slot { generation: 0, reserved: false, tenant: None });
        u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
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
            (slot.reserved, slot.tenant) = (false, None);
            self.len -= 1;
            self.free.push(token.slot - self.base);
            self.trim();
        }
    }

    /// Gives memory back after a burst: drops the free slots at the end. Each is looked at once, however many others
    /// a tenant before them keeps.
    fn trim(&mut self) {
        while self.slots.last().is_some_and(|slot| !slot.reserved) {
            self.slots.pop();
        }
        let used = self.slots.len();
        if self.slots.capacity() > 4 * (used + SPARE_SLOTS) {
            self.slots.shrink_to(used + SPARE_SLOTS);
            self.free.retain(|index| (*index as usize) < used);
            self.free.shrink_to(used + SPARE_SLOTS);
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

    /// The tenants that are `wanted`.
    pub(super) fn tokens(&self, wanted: impl Fn(&T) -> bool) -> Vec<Token> {
        self.iter().filter(|(_, tenant)| wanted(tenant)).map(|(token, _)| token).collect()
    }

    /// The tenants whose deadline has come; lowers `floor` to the earliest of the others'.
    pub(super) fn due(&self, now: Mono, floor: &mut Mono, deadline: impl Fn(&T) -> Mono) -> Vec<Token> {
        let later = self.iter().map(|(_, tenant)| deadline(tenant)).filter(|at| *at > now);
        *floor = later.fold(*floor, Mono::min);
        self.tokens(|tenant| deadline(tenant) <= now)
    }

    /// A new token for the same tenant; the old one is void.
    pub(super) fn renew(&mut self, token: Token) -> Token {
        let generation = self.next_generation();
        match self.slot(token) {
            Some(slot) => {
                slot.generation = generation;
                Token { slot: token.slot, generation }
            }
            None => token,
        }
    }

    /// Stays below 2^31, so that no packed token is one of the loop's own names.
    fn next_generation(&mut self) -> u32 {
        self.generation = (self.generation + 1) & 0x7fff_ffff;
        self.generation
    }

    #[inline]
    fn slot(&mut self, token: Token) -> Option<&mut Slot<T>> {
        let index = token.slot.checked_sub(self.base)? as usize;
        self.slots.get_mut(index).filter(|slot| slot.reserved && slot.generation == token.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use std::collections::HashMap;

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

    #[test]
    fn a_burst_gives_its_memory_back() {
        let mut slab = Slab::new(10);
        let tokens: Vec<Token> = (0..1000).map(|_| slab.reserve()).collect();
        for token in &tokens {
            slab.put(*token, token.slot);
        }
        // Out for a moment when the others go: its slot must stay.
        assert_eq!(slab.take(tokens[40]), Some(50));
        for token in tokens.iter().filter(|token| **token != tokens[40]).rev() {
            slab.vacate(*token);
        }
        assert!(slab.slots.capacity() <= 4 * (41 + SPARE_SLOTS), "{}", slab.slots.capacity());
        slab.put(tokens[40], 51);
        assert_eq!((slab.get(tokens[40]), slab.len()), (Some(&51), 1));
        // Every slot is given out once, and no old token reaches a new tenant.
        let anew: Vec<Token> = (0..999).map(|_| slab.reserve()).collect();
        let mut slots: Vec<u32> = anew.iter().chain([&tokens[40]]).map(|token| token.slot).collect();
        slots.sort_unstable();
        assert_eq!(slots, (10..1010).collect::<Vec<_>>());
        for token in &anew {
            slab.put(*token, 0);
        }
        assert!(tokens.iter().filter(|token| **token != tokens[40]).all(|token| slab.get(*token).is_none()));
    }

    #[test]
    fn no_free_slots_are_looked_through_at_each_leave() {
        let mut slab: Slab<()> = Slab::new(10);
        let tokens: Vec<Token> = (0..1000).map(|_| slab.reserve()).collect();
        for token in tokens.iter().filter(|token| **token != tokens[230]) {
            slab.vacate(*token);
        }
        assert_eq!((slab.slots.len(), slab.len()), (231, 1));
    }

    #[test]
    fn what_is_due_and_when_the_next_is() {
        let at = Mono::from_micros;
        let mut slab = Slab::new(0);
        let tokens = [30, 10, 20].map(|us| {
            let token = slab.reserve();
            slab.put(token, at(us));
            token
        });
        let mut floor = Mono::NEVER;
        assert_eq!(slab.due(at(20), &mut floor, |it| *it), [tokens[1], tokens[2]]);
        assert_eq!(floor, at(30));
        assert!(slab.due(at(5), &mut floor, |it| *it).is_empty());
        assert_eq!(floor, at(10));
        assert_eq!(slab.due(at(30), &mut floor, |it| *it).len(), 3);
        assert_eq!(floor, at(10), "never raised");
    }

    /// Against a map of all tenants; `None`: out for a moment.
    #[test]
    fn does_as_a_map_does() {
        let mut random = Random::from_seed(9);
        let mut slab = Slab::new(10);
        let (mut model, mut void) = (HashMap::<Token, Option<usize>>::new(), Vec::new());
        for step in 0..10_000 {
            // Bursts, and ebbs between them.
            let grows = step / 1000 % 2 == 0;
            let token = model.keys().next().copied();
            match (random.up_to(7), token) {
                (0..=3, _) | (4, None) if grows => {
                    let token = slab.reserve();
                    assert!(model.keys().all(|other| other.slot != token.slot), "given out twice");
                    slab.put(token, step);
                    model.insert(token, Some(step));
                }
                (0..=4, Some(token)) => {
                    slab.vacate(token);
                    model.remove(&token);
                    void.push(token);
                }
                (5, Some(token)) => assert_eq!(slab.take(token), model.insert(token, None).flatten()),
                (6, Some(token)) => {
                    slab.put(token, step);
                    model.insert(token, Some(step));
                }
                (_, Some(token)) => {
                    let tenant = model.remove(&token).flatten();
                    model.insert(slab.renew(token), tenant);
                    void.push(token);
                }
                (_, None) => {}
            }
            if let Some(token) = void.get(step % (void.len() + 1)) {
                slab.put(*token, 0);
                slab.vacate(*token);
                assert_eq!((slab.take(*token), slab.renew(*token)), (None, *token));
                assert_eq!(slab.get(*token), None);
            }
            assert_eq!(slab.len(), model.len());
            assert!(model.iter().all(|(token, tenant)| slab.get(*token) == tenant.as_ref()));
            assert_eq!(slab.iter().count(), model.values().flatten().count());
        }
    }
}
