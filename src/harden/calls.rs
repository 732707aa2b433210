//! seccomp: the system calls that a serving agent makes, and no others.

use libc::c_long;
use seccompiler::{
    BackendError, SeccompAction, SeccompCmpArgLen as Width, SeccompCmpOp as Is, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter_all_threads,
};
use std::collections::BTreeMap;

/// What is refused with this looks to a library like a right that it does not have: it goes another way, or
/// reports it. A resolver's plug-in that nobody thought of must not end the agent.
const REFUSED: u32 = libc::EPERM as u32;

/// Whatever the arguments.
#[rustfmt::skip]
const ALLOWED: &[c_long] = &[
    // The loop, and the helper thread's poll.
    libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_epoll_pwait2, libc::SYS_ppoll,
    // Sockets.
    libc::SYS_accept4, libc::SYS_bind, libc::SYS_connect, libc::SYS_getpeername, libc::SYS_getsockname,
    libc::SYS_getsockopt, libc::SYS_recvfrom, libc::SYS_recvmmsg, libc::SYS_recvmsg, libc::SYS_sendmmsg,
    libc::SYS_sendmsg, libc::SYS_sendto, libc::SYS_setsockopt, libc::SYS_shutdown,
    // Descriptors and files; which ones is Landlock's.
    libc::SYS_close, libc::SYS_faccessat, libc::SYS_faccessat2, libc::SYS_fcntl, libc::SYS_fstat,
    libc::SYS_ftruncate, libc::SYS_getcwd, libc::SYS_lseek, libc::SYS_mkdirat, libc::SYS_newfstatat,
    libc::SYS_openat, libc::SYS_pread64, libc::SYS_read, libc::SYS_readlinkat, libc::SYS_readv,
    libc::SYS_renameat2, libc::SYS_statx, libc::SYS_unlinkat, libc::SYS_write,
    libc::SYS_writev,
    // Memory.
    libc::SYS_brk, libc::SYS_madvise, libc::SYS_mremap, libc::SYS_munmap,
    // Threads and signals; the helper thread may still be starting.
    libc::SYS_exit, libc::SYS_exit_group, libc::SYS_futex, libc::SYS_getpid, libc::SYS_gettid,
    libc::SYS_restart_syscall, libc::SYS_rseq, libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn, libc::SYS_sched_getaffinity, libc::SYS_sched_yield, libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    // Time, chance, who and where we are.
    libc::SYS_clock_gettime, libc::SYS_clock_nanosleep, libc::SYS_getegid, libc::SYS_geteuid, libc::SYS_getgid,
    libc::SYS_getrandom, libc::SYS_getrusage, libc::SYS_gettimeofday, libc::SYS_getuid, libc::SYS_nanosleep,
    libc::SYS_uname,
];

/// The same calls as older kernels had them, which both C libraries still make there.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const ALLOWED_LEGACY: &[c_long] = &[
    libc::SYS_access, libc::SYS_epoll_wait, libc::SYS_lstat, libc::SYS_mkdir, libc::SYS_open, libc::SYS_poll,
    libc::SYS_readlink, libc::SYS_rename, libc::SYS_renameat,
    libc::SYS_stat, libc::SYS_time, libc::SYS_unlink,
];
/// renameat, which the libc crate does not name for aarch64 with glibc.
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_LEGACY: &[c_long] = &[38];

/// No program makes these by mistake when it is an agent: they are an attack, and end it.
#[rustfmt::skip]
const KILLED: &[c_long] = &[
    libc::SYS_add_key, libc::SYS_bpf, libc::SYS_execve, libc::SYS_execveat, libc::SYS_finit_module,
    libc::SYS_init_module, libc::SYS_io_uring_setup, libc::SYS_kexec_load, libc::SYS_keyctl,
    libc::SYS_memfd_create, libc::SYS_mount, libc::SYS_open_by_handle_at, libc::SYS_perf_event_open,
    libc::SYS_pidfd_getfd, libc::SYS_process_vm_readv, libc::SYS_process_vm_writev, libc::SYS_ptrace,
    libc::SYS_request_key, libc::SYS_setns, libc::SYS_unshare, libc::SYS_userfaultfd,
];
#[cfg(target_arch = "x86_64")]
const KILLED_LEGACY: &[c_long] = &[libc::SYS_fork, libc::SYS_vfork];
#[cfg(not(target_arch = "x86_64"))]
const KILLED_LEGACY: &[c_long] = &[];

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

/// The system calls that are allowed, some of them with certain arguments only. Every other is refused (EPERM).
/// Errors: never, unless the tables here break seccompiler's rules.
fn allowed() -> Result<Rules, BackendError> {
    let mut rules: Rules =
        [ALLOWED, ALLOWED_LEGACY].concat().into_iter().map(|call| (call, vec![])).collect();
    // No netlink, no raw packets: to names, to KMS, to systemd.
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6];
    rules.insert(libc::SYS_socket, one_of(0, &families.map(i64::from))?);
    // Terminals, devices and interfaces are nothing to it.
    let requests = [libc::FIONBIO, libc::FIOCLEX, libc::FIONREAD].map(|request| request as i64);
    rules.insert(libc::SYS_ioctl, one_of(1, &requests)?);
    // A thread tells its name.
    rules.insert(libc::SYS_prctl, one_of(0, &[i64::from(libc::PR_SET_NAME)])?);
    // To read limits, not to set them.
    let null = SeccompCondition::new(2, Width::Qword, Is::Eq, 0)?;
    rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(vec![null])?]);
    // abort(); nobody else's threads.
    rules.insert(libc::SYS_tgkill, one_of(0, &[i64::from(std::process::id())])?);
    // Memory is never made executable; a library that glibc loads for the resolver comes from a file.
    let exec = libc::PROT_EXEC as u64;
    rules.insert(libc::SYS_mprotect, vec![rule(2, Is::MaskedEq(exec), 0)?]);
    let anonymous = libc::MAP_ANONYMOUS as u64;
    rules.insert(libc::SYS_mmap, vec![rule(2, Is::MaskedEq(exec), 0)?, rule(3, Is::MaskedEq(anonymous), 0)?]);
    Ok(rules)
}

/// The system calls that end the process.
/// Errors: as [`allowed`].
fn killed() -> Result<Rules, BackendError> {
    let mut rules: Rules = [KILLED, KILLED_LEGACY].concat().into_iter().map(|call| (call, vec![])).collect();
    // Another process; another thread is only refused.
    rules.insert(libc::SYS_clone, vec![rule(0, Is::MaskedEq(libc::CLONE_THREAD as u64), 0)?]);
    Ok(rules)
}

fn rule(argument: u8, is: Is, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, Width::Dword, is, value)?])
}

fn one_of(argument: u8, values: &[i64]) -> Result<Vec<SeccompRule>, BackendError> {
    values.iter().map(|value| rule(argument, Is::Eq, *value as u64)).collect()
}

/// Gives how many system calls are allowed, or why no filter is in force.
pub(super) fn restrict() -> Result<usize, String> {
    try_restrict().map_err(|error| format!("seccomp failed ({error}), so system calls are not restricted"))
}

fn try_restrict() -> Result<usize, seccompiler::Error> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let allowed = allowed()?;
    let count = allowed.len();
    // Of two filters the stricter word counts.
    let refuse = SeccompFilter::new(allowed, SeccompAction::Errno(REFUSED), SeccompAction::Allow, arch)?;
    let kill = SeccompFilter::new(killed()?, SeccompAction::Allow, SeccompAction::KillProcess, arch)?;
    for filter in [kill, refuse] {
        let program: seccompiler::BpfProgram = filter.try_into()?;
        apply_filter_all_threads(&program)?;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_compile_and_do_not_contradict_each_other() {
        let (allowed, killed) = (allowed().unwrap(), killed().unwrap());
        assert!(killed.keys().all(|call| !allowed.contains_key(call)));
        assert_eq!(ALLOWED.len() + ALLOWED_LEGACY.len() + 7, allowed.len(), "none is there twice");
        for arch in [TargetArch::x86_64, TargetArch::aarch64] {
            let filter = SeccompFilter::new(
                allowed.clone(),
                SeccompAction::Errno(REFUSED),
                SeccompAction::Allow,
                arch,
            );
            assert!(seccompiler::BpfProgram::try_from(filter.unwrap()).is_ok());
        }
    }
}
