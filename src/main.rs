//! The `kms-agent` binary: arguments in, exit code out.

fn main() -> std::process::ExitCode {
    kms_agent::cli::main().into()
}
