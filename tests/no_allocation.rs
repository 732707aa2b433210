#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
//! A cached hit, from the read to the write, allocates nothing.

#[path = "../benches/hit/wire.rs"]
mod wire;

use allocation_counter::measure;
use kms_agent::config::ResponseType;
use wire::Agent;

#[test]
fn a_hit_allocates_nothing() {
    for response_type in [ResponseType::Kms, ResponseType::Aws] {
        let mut agent = Agent::start(response_type, None);
        // The wire's own buffers and the loop's grow once.
        agent.serve(2);
        let counted = measure(|| {
            agent.serve(100);
        });
        assert_eq!(counted.count_total, 0, "{response_type:?}: {counted:?}");
    }
}
