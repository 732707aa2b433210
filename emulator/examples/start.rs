//! The smallest use of the emulator.

use kms_emulator::{Emulator, NewSecret, Options};

fn main() -> std::io::Result<()> {
    let secrets = vec![NewSecret::generic("agent-test", "hello")];
    let emulator = Emulator::start(Options { secrets, ..Options::default() })?;
    println!("KMS on {}, metadata on {}", emulator.kms_addr(), emulator.metadata_url());
    assert_eq!(emulator.counters().kms_requests, 0);
    Ok(())
}
