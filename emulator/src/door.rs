//! A listening port that can be shut and opened again under the same number.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;

/// Connections that wait to be accepted; a test may open hundreds at once.
const BACKLOG: u32 = 1024;
/// A port that was just given up is tried again so often, [`REBIND_PAUSE`] apart.
const REBIND_TRIES: u32 = 400;
const REBIND_PAUSE: Duration = Duration::from_millis(5);

/// What the listening task is told to do. It answers on `done`, so that the caller knows it is in force.
pub(crate) struct DoorCommand {
    pub(crate) open: bool,
    pub(crate) done: std::sync::mpsc::SyncSender<io::Result<()>>,
}

pub(crate) struct Door {
    addr: SocketAddr,
    state: DoorState,
}

enum DoorState {
    Open(TcpListener),
    /// Bound but not listening: connects are refused, and nobody else is given the port.
    Shut {
        _holder: TcpSocket,
    },
}

impl Door {
    /// Listens; port 0: any free one. `service` is for the error's text.
    pub(crate) fn open(service: &str, addr: SocketAddr) -> io::Result<Door> {
        let listener = bound(addr).and_then(|socket| socket.listen(BACKLOG)).map_err(|error| {
            io::Error::new(error.kind(), format!("cannot listen on {addr} for {service}: {error}"))
        })?;
        Ok(Door { addr: listener.local_addr()?, state: DoorState::Open(listener) })
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Accepts for ever, obeying the commands that come in between.
    pub(crate) async fn run(
        mut self,
        mut commands: mpsc::UnboundedReceiver<DoorCommand>,
        on_connection: impl Fn(TcpStream),
    ) {
        loop {
            let command = match &self.state {
                DoorState::Shut { .. } => commands.recv().await,
                DoorState::Open(listener) => match crate::race(commands.recv(), listener.accept()).await {
                    Err(Ok((stream, _))) => {
                        on_connection(stream);
                        continue;
                    }
                    Err(Err(_)) => {
                        // Out of descriptors, most likely: without a pause this loop would burn a core.
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        continue;
                    }
                    Ok(command) => command,
                },
            };
            let Some(command) = command else { return };
            let outcome = self.switch(command.open).await;
            // The caller may have given up waiting.
            let _ = command.done.send(outcome);
        }
    }

    async fn switch(&mut self, open: bool) -> io::Result<()> {
        let state = match (&self.state, open) {
            (DoorState::Open(_), true) | (DoorState::Shut { .. }, false) => return Ok(()),
            // Both sockets exist for a moment: the port never is up for grabs.
            (DoorState::Shut { .. }, true) => DoorState::Open(bound(self.addr)?.listen(BACKLOG)?),
            (DoorState::Open(_), false) => {
                // A socket cannot be bound beside a listening one, so the listener has to go first.
                self.state = DoorState::Shut { _holder: socket_for(self.addr)? };
                DoorState::Shut { _holder: bound_again(self.addr).await? }
            }
        };
        self.state = state;
        Ok(())
    }
}

/// As [`bound`], after a listener was closed. A test that starts a program at this moment forks, and the fork
/// keeps a copy of the listener until its exec.
async fn bound_again(addr: SocketAddr) -> io::Result<TcpSocket> {
    for _ in 0..REBIND_TRIES {
        match bound(addr) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => tokio::time::sleep(REBIND_PAUSE).await,
            outcome => return outcome,
        }
    }
    bound(addr)
}

fn socket_for(addr: SocketAddr) -> io::Result<TcpSocket> {
    if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }
}

fn bound(addr: SocketAddr) -> io::Result<TcpSocket> {
    let socket = socket_for(addr)?;
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    Ok(socket)
}
