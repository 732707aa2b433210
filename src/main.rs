//! The `kms-agent` binary: arguments in, exit code out.

use kms_agent::wipe::WipingAllocator;

#[global_allocator]
static ALLOCATOR: WipingAllocator = WipingAllocator;

fn main() -> std::process::ExitCode {
    kms_agent::cli::main().into()
}
