//! What the fuzz targets share: the agent they knock at, and the ways in which bytes can come apart.

use kms_agent::config::{self, Config, ResponseType};
use kms_agent::secret::Secret;
use std::sync::LazyLock;

/// The token of the agent that is fuzzed. Short, so that mutations keep it whole.
pub const TOKEN: &[u8] = b"t0k";

/// Up to so many bytes are also fed one by one.
const SINGLE_BYTES_MAX: usize = 512;
/// About so many pieces at most: the request parser begins anew with each.
const PIECES_MAX: usize = 200;

/// The agent under test.
pub struct Agent {
    /// `[Server]`, once for each `ResponseType`.
    pub servers: [config::ServerSection; 3],
    /// Holds [`TOKEN`].
    pub token: Secret,
}

/// The one agent of the process.
pub static AGENT: LazyLock<Agent> = LazyLock::new(|| Agent {
    servers: [ResponseType::Kms, ResponseType::Aws, ResponseType::Vault].map(|response_type| {
        config::ServerSection {
            response_type,
            allowed_hosts: vec!["agent.internal".to_owned(), "::2".to_owned()],
            ..Config::default().server
        }
    }),
    token: Secret::from(TOKEN),
});

/// Several ways to take `bytes` apart, chosen by the bytes themselves: so the input of a target is nothing but
/// what would be on the wire, and seeds can be real traffic.
#[must_use]
pub fn splits(bytes: &[u8]) -> Vec<Vec<&[u8]>> {
    let mut random = Random::of(bytes);
    let mut all = Vec::new();
    let (head, tail) = bytes.split_at(random.below(bytes.len() + 1));
    all.push(vec![head, tail]);
    for step_max in [3, 40, 1500].into_iter().filter(|step| bytes.len() / step * 2 <= PIECES_MAX) {
        let mut pieces = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            // An empty piece now and then: nothing may follow from it.
            let (piece, left) = rest.split_at(random.below(step_max + 1).min(rest.len()));
            pieces.push(piece);
            rest = left;
        }
        all.push(pieces);
    }
    if bytes.len() <= SINGLE_BYTES_MAX {
        all.push(bytes.chunks(1).collect());
    }
    all
}

/// Splitmix64, seeded with FNV-1a of the input.
struct Random(u64);

impl Random {
    fn of(bytes: &[u8]) -> Random {
        let fold = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        Random(bytes.iter().fold(0xcbf2_9ce4_8422_2325, fold))
    }

    /// A number from 0 to `limit - 1`.
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) >> 1).unwrap_or(0) % limit
    }
}

/// Whether text is fit for a log line, a header or a message: nothing in it moves a cursor.
#[must_use]
pub fn is_printable(text: &str) -> bool {
    !text.chars().any(char::is_control)
}
