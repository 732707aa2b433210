//! `kms-emulator`: the emulator as a program.

mod cli;

use kms_emulator::{Emulator, Fault};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn main() -> ExitCode {
    let outcome = match cli::parse(std::env::args_os().skip(1)) {
        Ok(cli::Command::Help) => write!(io::stdout(), "{}", cli::HELP),
        Ok(cli::Command::Version) => writeln!(io::stdout(), "kms-emulator {}", env!("CARGO_PKG_VERSION")),
        Ok(cli::Command::Run(settings)) => run(*settings),
        Err(message) => {
            eprintln!("kms-emulator: {message}\nTry 'kms-emulator --help'.");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of our output has ended, as `| head` does; that is no failure.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kms-emulator: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(settings: cli::Settings) -> io::Result<()> {
    // The handlers come first, so that a signal during the set-up is not lost.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _in_runtime = runtime.enter();
    let interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;

    let (region, secrets) = (settings.options.region.clone(), secret_names(&settings));
    let aaps = settings.options.aaps.clone();
    let emulator = Emulator::start(settings.options)?;
    for (name, status, code) in &settings.failures {
        emulator.inject(Fault::error(*status, code).for_secret(name));
    }
    let ca = CaFile::write(settings.ca_out.as_deref(), emulator.ca_pem())?;
    let aaps: Vec<String> = aaps.iter().map(|name| emulator.aap_arn(name)).collect();
    announce(&emulator, &region, &secrets, &aaps.join(", "), ca.path())?;
    runtime.block_on(either_signal(interrupt, terminate));
    Ok(())
}

async fn either_signal(mut a: tokio::signal::unix::Signal, mut b: tokio::signal::unix::Signal) {
    std::future::poll_fn(|cx| match (a.poll_recv(cx), b.poll_recv(cx)) {
        (std::task::Poll::Pending, std::task::Poll::Pending) => std::task::Poll::Pending,
        _ => std::task::Poll::Ready(()),
    })
    .await;
}

fn secret_names(settings: &cli::Settings) -> String {
    let names: Vec<&str> = settings.options.secrets.iter().map(|s| s.name.as_str()).collect();
    if names.is_empty() { "none (name them with --secrets FILE)".to_owned() } else { names.join(", ") }
}

fn announce(emulator: &Emulator, region: &str, secrets: &str, aaps: &str, ca: &Path) -> io::Result<()> {
    let (kms, metadata, ca) = (emulator.kms_addr(), emulator.metadata_url(), ca.display());
    let mut out = io::stdout().lock();
    // This is a whole configuration file for the agent, so what is for the reader alone is a comment.
    writeln!(
        out,
        "# KMS, STS       https://{kms}\n\
         # Metadata       {metadata}\n\
         # AapArn         {aaps}\n\
         # CA             {ca}\n\
         # Secrets        {secrets}\n\
         \n\
         [KMS]\n\
         Region = \"{region}\"\n\
         Endpoint = \"{kms}\"\n\
         AuthType = \"ram_role\"\n\
         CaFile = \"{ca}\"\n\
         MetadataEndpoint = \"{metadata}\"\n\
         \n\
         # The emulator is running; Ctrl-C ends it."
    )?;
    out.flush()
}

/// The CA's certificate in a file: at the path that the user names, where it is kept, or in the temporary folder,
/// from which it is removed at the end.
enum CaFile {
    Kept(PathBuf),
    Temporary(PathBuf),
}

impl CaFile {
    fn write(wanted: Option<&Path>, pem: &str) -> io::Result<CaFile> {
        let told = |path: &Path, error: io::Error| {
            io::Error::new(error.kind(), format!("cannot write {}: {error}", path.display()))
        };
        if let Some(path) = wanted {
            std::fs::write(path, pem).map_err(|error| told(path, error))?;
            return Ok(CaFile::Kept(std::path::absolute(path)?));
        }
        let path = std::env::temp_dir().join(format!("kms-emulator-ca-{}.pem", std::process::id()));
        // `create_new` follows no link and overwrites no file that is there.
        let mut file = std::fs::File::options()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|error| told(&path, error))?;
        file.write_all(pem.as_bytes())?;
        Ok(CaFile::Temporary(path))
    }

    fn path(&self) -> &Path {
        match self {
            CaFile::Kept(path) | CaFile::Temporary(path) => path,
        }
    }
}

impl Drop for CaFile {
    fn drop(&mut self) {
        if let CaFile::Temporary(path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}
