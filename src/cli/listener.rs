//! Who listens on a port of this host, as far as /proc tells.

use crate::text::excerpt;
use std::fmt;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

/// The name of a process in a message; the kernel keeps 15 bytes of it.
const NAME_BYTES_MAX: usize = 64;
/// A state of /proc/net/tcp.
const LISTEN: &str = "0A";
/// Where a request to `127.0.0.1` or `[::1]` may end up: those, the IPv4 address as IPv6 has it, and any address.
/// In hex as /proc/net/tcp and tcp6 have it on a little-endian machine.
const ADDRESSES: [&str; 5] = [
    "0100007F",
    "00000000",
    "00000000000000000000000001000000",
    "00000000000000000000000000000000",
    "0000000000000000FFFF00000100007F",
];

#[derive(Debug, PartialEq, Eq)]
struct Socket {
    inode: u64,
    uid: u32,
}

/// Who holds a port.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Holder {
    Process {
        pid: u32,
        name: String,
    },
    /// A process of this user; which one may only be seen by root.
    Somebody {
        uid: u32,
    },
    /// /proc does not tell.
    Unknown,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Process { pid, name } => write!(f, "{name} (pid {pid})"),
            Holder::Somebody { uid } => {
                write!(f, "a program of user {uid} (run this as root to see which one)")
            }
            Holder::Unknown => f.write_str("another program"),
        }
    }
}

/// Who listens on `port` of loopback.
pub(super) fn of(port: u16) -> Holder {
    let sockets: Vec<Socket> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .flat_map(|table| listening(&table, port))
        .collect();
    let links: Vec<String> = sockets.iter().map(|socket| format!("socket:[{}]", socket.inode)).collect();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in processes {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if has_open(&process.path(), &links) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Holder::Process { pid, name: excerpt(name.trim(), NAME_BYTES_MAX) };
        }
    }
    sockets.first().map_or(Holder::Unknown, |socket| Holder::Somebody { uid: socket.uid })
}

/// The rows of a table of /proc/net that listen on `port` where loopback gets to, see proc_net(5).
fn listening(table: &str, port: u16) -> Vec<Socket> {
    let row = |line: &str| {
        // sl, local address, remote address, state, queues, timer, retransmits, uid, timeout, inode
        let mut fields = line.split_ascii_whitespace();
        let (address, port_hex) = fields.nth(1)?.split_once(':')?;
        let is_ours = ADDRESSES.contains(&address)
            && u16::from_str_radix(port_hex, 16) == Ok(port)
            && fields.nth(1) == Some(LISTEN);
        let uid = fields.nth(3)?.parse().ok()?;
        let inode = fields.nth(1)?.parse().ok()?;
        is_ours.then_some(Socket { inode, uid })
    };
    table.lines().filter_map(row).collect()
}

fn has_open(process: &Path, links: &[String]) -> bool {
    let open = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    open.filter_map(|fd| fs::read_link(fd.path()).ok())
        .any(|target| target.to_str().is_some_and(|target| links.iter().any(|link| link == target)))
}

/// Whether this process might listen on `port` of 127.0.0.1. Binds and does not listen, which is in nobody's way.
/// Errors: why not.
pub(super) fn may_bind(port: u16) -> io::Result<()> {
    let socket =
        rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn rows_of_the_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:07E9 00000000:0000 0A 00000000:00000000 00:00000000 00000000  33        0 8112 1 0 100 0 0 10 0\n   \
            1: 0100007F:07E9 0100007F:8001 01 00000000:00000000 00:00000000 00000000   0        0 8113 1 0 20 4 0 10 -1\n   \
            2: 0200007F:07E9 00000000:0000 0A 00000000:00000000 00:00000000 00000000   0        0 8114 1 0 100 0 0 10 0\n   \
            3: 00000000:07EA 00000000:0000 0A 00000000:00000000 00:00000000 00000000   0        0 8115 1 0 100 0 0 10 0\n\
            nonsense\n";
        assert_eq!(listening(table, 2025), [Socket { inode: 8112, uid: 33 }]);
        assert_eq!(listening(table, 2026), [Socket { inode: 8115, uid: 0 }]);
        assert_eq!(listening(table, 2027), []);
    }

    #[test]
    fn we_find_ourselves() {
        for address in ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"] {
            // Where there is no IPv6.
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let port = listener.local_addr().unwrap().port();
            assert!(
                matches!(of(port), Holder::Process { pid, .. } if pid == std::process::id()),
                "{address}: {:?}",
                of(port)
            );
        }
    }

    #[test]
    fn a_port_that_is_taken_cannot_be_bound() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(may_bind(port).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        may_bind(0).unwrap();
    }
}
