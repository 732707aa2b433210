//! Landlock: a file system view of the process's own, kept by the kernel (5.13 and newer).

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, LandlockStatus, RestrictionStatus, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope, make_bitflags,
    path_beneath_rules,
};
use std::path::{Path, PathBuf};

/// What is taken away, as of this version of Landlock; an older kernel takes away what it knows.
const ABI_WANTED: ABI = ABI::V5;

/// What getaddrinfo reads. Whole folders: these files are replaced by renaming, and a rule for a file is one
/// for the inode that it had. The libraries are those of nsswitch.conf, which glibc loads when it needs them.
const RESOLVER: &[&str] = &[
    "/etc",
    "/usr/etc",
    "/run/NetworkManager",
    "/run/resolvconf",
    "/run/systemd/resolve",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
];
/// Of what getaddrinfo reads, what is often a link out of `/etc`, to places that each distribution has for itself
/// (`/run/netconfig`, `/run/connman`, ..).
const RESOLVER_LINKS: &[&str] = &["/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf"];

/// The files that the agent opens while it serves. Those it has open already are not
/// concerned; what names are resolved with is always among them.
#[derive(Clone, Debug, Default)]
pub struct Files {
    read: Vec<PathBuf>,
    write: Option<PathBuf>,
}

impl Files {
    /// This file, and whatever is renamed to it later: its whole folder may be read, with all that is in it, and
    /// that of the file that a symbolic link leads to now. Where a folder on its way is a link (Kubernetes replaces
    /// a volume's files by its link `..data`), so may the folder which that is in: what it leads to next is mostly
    /// beside what it leads to now.
    pub fn read(&mut self, file: &Path) {
        let Ok(file) = std::path::absolute(file) else { return };
        let mut folders: Vec<&Path> = file.parent().into_iter().collect();
        folders.extend(file.ancestors().skip(1).filter(|it| it.is_symlink()).filter_map(|link| {
            // Links in `/` and right below (`/var/run`) are the system's own; they stay, and would open too much.
            link.parent().filter(|folder| folder.components().count() > 2)
        }));
        let target = file.canonicalize().ok();
        folders.extend(target.as_deref().and_then(Path::parent));
        for folder in folders {
            if !self.read.iter().any(|known| known == folder) {
                self.read.push(folder.to_path_buf());
            }
        }
    }

    /// The one folder in which files are made, written, renamed and removed.
    pub fn write(&mut self, folder: &Path) {
        self.write = Some(folder.to_path_buf());
    }
}

/// Gives what is in force, for the log, or why nothing is.
pub(super) fn restrict(files: &Files) -> Result<String, String> {
    match try_restrict(files) {
        Ok(RestrictionStatus { ruleset: RulesetStatus::NotEnforced, landlock, .. }) => {
            Err(format!("this kernel has no Landlock ({landlock:?}), so access to files is not restricted"))
        }
        Ok(RestrictionStatus { ruleset, landlock, .. }) => Ok(match (ruleset, landlock) {
            (RulesetStatus::PartiallyEnforced, LandlockStatus::Available { effective_abi, .. }) => {
                format!("Landlock (as far as the kernel has it: {effective_abi:?})")
            }
            _ => "Landlock".to_owned(),
        }),
        Err(error) => Err(format!("Landlock failed ({error}), so access to files is not restricted")),
    }
}

fn try_restrict(files: &Files) -> Result<RestrictionStatus, RulesetError> {
    let mut files = files.clone();
    RESOLVER_LINKS.iter().for_each(|file| files.read(Path::new(file)));
    let read: BitFlags<AccessFs> = AccessFs::ReadFile.into();
    // Rotation: the file is renamed within its folder, a new one made, the oldest removed.
    let write = make_bitflags!(AccessFs::{ReadFile | WriteFile | Truncate | MakeReg | RemoveFile});
    Ruleset::default()
        // All of it, execution included: what no rule gives back is forbidden.
        .handle_access(AccessFs::from_all(ABI_WANTED))?
        // The agent listens already.
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::Signal)?
        .create()?
        .add_rules(path_beneath_rules(RESOLVER, read))?
        .add_rules(path_beneath_rules(&files.read, read))?
        .add_rules(path_beneath_rules(&files.write, write))?
        .restrict_self()
}
