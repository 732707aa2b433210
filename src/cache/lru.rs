//! A map of fixed capacity that forgets what was used least recently: a slab, a linked order
//! through it, and a hash table of slab positions.

use super::key::{Key, KeyRef};
use hashbrown::{DefaultHashBuilder, HashTable};
use std::hash::BuildHasher;

const NIL: u32 = u32::MAX;

#[derive(Debug)]
struct Node<V> {
    key: Key,
    hash: u64,
    value: V,
    weight_bytes: usize,
    newer: u32,
    older: u32,
}

/// Keys and values, bounded by number and by bytes.
#[derive(Debug)]
pub struct Lru<V> {
    nodes: Vec<Option<Node<V>>>,
    free: Vec<u32>,
    table: HashTable<u32>,
    hasher: DefaultHashBuilder,
    newest: u32,
    oldest: u32,
    bytes: usize,
    entries_max: usize,
    bytes_max: usize,
}

impl<V> Lru<V> {
    /// Holds at most `entries_max` values whose weights add up to at most `bytes_max`.
    #[must_use]
    pub fn new(entries_max: usize, bytes_max: usize) -> Lru<V> {
        Lru {
            nodes: Vec::new(),
            free: Vec::new(),
            table: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            newest: NIL,
            oldest: NIL,
            bytes: 0,
            entries_max,
            bytes_max,
        }
    }

    /// How many values there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// The sum of all weights.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The most values, and the most that their weights may add up to.
    #[must_use]
    pub fn limits(&self) -> (usize, usize) {
        (self.entries_max, self.bytes_max)
    }

    /// The value of `key`, its place in the order unchanged.
    #[must_use]
    pub fn peek(&self, key: KeyRef<'_>) -> Option<&V> {
        let position = self.position(key, self.hash(key))?;
        self.node(position).map(|node| &node.value)
    }

    /// As [`Lru::peek`], to change it; its weight stays.
    pub fn peek_mut(&mut self, key: KeyRef<'_>) -> Option<&mut V> {
        let position = self.position(key, self.hash(key))?;
        self.node_mut(position).map(|node| &mut node.value)
    }

    /// The value of `key`, which becomes the newest.
    pub fn touch(&mut self, key: KeyRef<'_>) -> Option<&mut V> {
        let position = self.position(key, self.hash(key))?;
        if self.newest != position {
            self.unlink(position);
            self.link_newest(position);
        }
        self.node_mut(position).map(|node| &mut node.value)
    }

    /// Puts a value in as the newest, in place of the one that `key` had, and drops the oldest
    /// until both limits hold. A value that is heavier than the whole cache is not kept: `false`,
    /// and the previous one is gone all the same.
    pub fn insert(&mut self, key: Key, value: V, weight_bytes: usize) -> bool {
        self.remove(key.as_ref());
        if weight_bytes > self.bytes_max || self.entries_max == 0 {
            return false;
        }
        while self.len() >= self.entries_max || self.bytes + weight_bytes > self.bytes_max {
            self.remove_at(self.oldest);
        }
        let hash = self.hash(key.as_ref());
        let node = Node { key, hash, value, weight_bytes, newer: NIL, older: NIL };
        let position = match self.free.pop() {
            Some(position) => position,
            None => {
                self.nodes.push(None);
                // `entries_max` is far below u32::MAX; the slab never outgrows it.
                u32::try_from(self.nodes.len() - 1).unwrap_or(NIL)
            }
        };
        match self.nodes.get_mut(position as usize) {
            Some(slot @ None) => *slot = Some(node),
            _ => debug_assert!(false, "the slab has no free place {position}"),
        }
        let nodes = &self.nodes;
        self.table.insert_unique(hash, position, |at| {
            nodes.get(*at as usize).and_then(Option::as_ref).map_or(0, |node| node.hash)
        });
        self.bytes += weight_bytes;
        self.link_newest(position);
        true
    }

    /// Drops the value of `key`; says whether there was one.
    pub fn remove(&mut self, key: KeyRef<'_>) -> bool {
        match self.position(key, self.hash(key)) {
            Some(position) => self.remove_at(position),
            None => false,
        }
    }

    /// All keys and values, newest first.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &V)> {
        let mut at = self.newest;
        std::iter::from_fn(move || {
            let node = self.node(at)?;
            at = node.older;
            Some((&node.key, &node.value))
        })
    }

    fn hash(&self, key: KeyRef<'_>) -> u64 {
        self.hasher.hash_one(key)
    }

    fn node(&self, position: u32) -> Option<&Node<V>> {
        self.nodes.get(position as usize)?.as_ref()
    }

    fn node_mut(&mut self, position: u32) -> Option<&mut Node<V>> {
        self.nodes.get_mut(position as usize)?.as_mut()
    }

    fn position(&self, key: KeyRef<'_>, hash: u64) -> Option<u32> {
        self.table.find(hash, |at| self.node(*at).is_some_and(|node| node.key.as_ref() == key)).copied()
    }

    fn remove_at(&mut self, position: u32) -> bool {
        self.unlink(position);
        let Some(node) = self.nodes.get_mut(position as usize).and_then(Option::take) else {
            debug_assert!(false, "nothing is at {position}");
            return false;
        };
        match self.table.find_entry(node.hash, |at| *at == position) {
            Ok(entry) => _ = entry.remove(),
            Err(_) => debug_assert!(false, "the table does not know {position}"),
        }
        self.bytes -= node.weight_bytes;
        self.free.push(position);
        true
    }

    fn unlink(&mut self, position: u32) {
        let Some(node) = self.node(position) else { return };
        let (newer, older) = (node.newer, node.older);
        match self.node_mut(newer) {
            Some(node) => node.older = older,
            None => self.newest = older,
        }
        match self.node_mut(older) {
            Some(node) => node.newer = newer,
            None => self.oldest = newer,
        }
    }

    fn link_newest(&mut self, position: u32) {
        let second = self.newest;
        if let Some(node) = self.node_mut(position) {
            (node.newer, node.older) = (NIL, second);
        }
        match self.node_mut(second) {
            Some(node) => node.newer = position,
            None => self.oldest = position,
        }
        self.newest = position;
    }

    /// Panics where slab, order and table disagree or a limit is broken.
    #[cfg(any(test, debug_assertions))]
    pub fn check_invariants(&self) {
        assert!(self.len() <= self.entries_max && self.bytes <= self.bytes_max);
        assert_eq!(self.iter().count(), self.len());
        assert_eq!(self.nodes.iter().flatten().count(), self.len());
        assert_eq!(self.nodes.iter().flatten().map(|node| node.weight_bytes).sum::<usize>(), self.bytes);
        assert_eq!(self.free.len() + self.len(), self.nodes.len());
        for (key, _) in self.iter() {
            assert!(self.peek(key.as_ref()).is_some());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: &str) -> Key {
        KeyRef::current(id).to_owned()
    }

    fn ids(lru: &Lru<u32>) -> Vec<&str> {
        lru.iter().map(|(key, _)| key.as_ref().id).collect()
    }

    #[test]
    fn forgets_the_least_recently_used() {
        let mut lru = Lru::new(3, 100);
        for (n, id) in ["a", "b", "c"].into_iter().enumerate() {
            assert!(lru.insert(key(id), u32::try_from(n).unwrap(), 1));
        }
        assert_eq!(lru.touch(KeyRef::current("a")), Some(&mut 0));
        assert_eq!(lru.peek(KeyRef::current("b")), Some(&1));
        lru.insert(key("d"), 3, 1);
        assert_eq!(ids(&lru), ["d", "a", "c"]);
        lru.check_invariants();
    }

    #[test]
    fn holds_to_its_bytes() {
        let mut lru = Lru::new(10, 10);
        lru.insert(key("a"), 1, 4);
        lru.insert(key("b"), 2, 4);
        lru.insert(key("c"), 3, 6);
        assert_eq!((ids(&lru), lru.bytes()), (vec!["c", "b"], 10));
        assert!(!lru.insert(key("c"), 4, 11), "heavier than everything");
        assert_eq!(ids(&lru), ["b"], "the old value is not kept in its place");
        lru.check_invariants();
    }

    #[test]
    fn replacing_does_not_evict_others() {
        let mut lru = Lru::new(2, 10);
        lru.insert(key("a"), 1, 5);
        lru.insert(key("b"), 2, 5);
        lru.insert(key("a"), 3, 5);
        assert_eq!(ids(&lru), ["a", "b"]);
        assert_eq!(lru.peek(KeyRef::current("a")), Some(&3));
    }

    /// Against a plain list that is obviously right.
    #[test]
    fn agrees_with_a_model() {
        let mut lru = Lru::new(5, 30);
        let mut model: Vec<(u64, u64, usize)> = Vec::new();
        let mut random = 9_u64;
        for _ in 0..20_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (what, id, weight) = (random >> 60, (random >> 50) % 9, ((random >> 40) % 12) as usize);
            let name = key(&id.to_string());
            match what {
                0..6 => {
                    lru.insert(name, u32::try_from(random >> 33).unwrap(), weight);
                    model.retain(|entry| entry.0 != id);
                    model.insert(0, (id, random >> 33, weight));
                    while model.len() > 5 || model.iter().map(|entry| entry.2).sum::<usize>() > 30 {
                        model.pop();
                    }
                }
                6..12 => {
                    let hit = lru.touch(name.as_ref()).map(|value| u64::from(*value));
                    let at = model.iter().position(|entry| entry.0 == id);
                    assert_eq!(hit, at.map(|at| model[at].1));
                    if let Some(at) = at {
                        let entry = model.remove(at);
                        model.insert(0, entry);
                    }
                }
                _ => {
                    let had = model.iter().any(|entry| entry.0 == id);
                    assert_eq!(lru.remove(name.as_ref()), had);
                    model.retain(|entry| entry.0 != id);
                }
            }
            lru.check_invariants();
            let seen: Vec<u64> = lru.iter().map(|(_, value)| u64::from(*value)).collect();
            assert_eq!(seen, model.iter().map(|entry| entry.1).collect::<Vec<_>>());
        }
    }
}
