//! Names to addresses. `getaddrinfo` blocks, so a parked thread of its own does it, and its answer wakes
//! the loop.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

/// Stack of the helper thread, in bytes: glibc's and musl's resolvers need less than half of it.
const STACK_BYTES: usize = 256 * 1024;

/// An answer.
#[derive(Debug)]
pub struct Resolved {
    /// The name that was asked.
    pub host: String,
    /// The port that was asked with it.
    pub port: u16,
    /// Its addresses, or why there are none.
    pub result: Result<Vec<SocketAddr>, String>,
}

/// The helper thread's two ends. The thread ends when this is dropped.
#[derive(Debug)]
pub struct Resolver {
    questions: Sender<(String, u16)>,
    answers: Receiver<Resolved>,
}

impl Resolver {
    /// Starts the thread; `wake` is called after each answer.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(wake: impl Fn() + Send + 'static) -> io::Result<Resolver> {
        let (questions, asked) = channel::<(String, u16)>();
        let (answer, answers) = channel();
        thread::Builder::new().name("resolver".into()).stack_size(STACK_BYTES).spawn(move || {
            for (host, port) in asked {
                let result = look_up(&host, port);
                if answer.send(Resolved { host, port, result }).is_err() {
                    return;
                }
                wake();
            }
        })?;
        Ok(Resolver { questions, answers })
    }

    /// Asks for a name's addresses.
    pub fn ask(&self, host: &str, port: u16) {
        // The receiver is gone only if the thread died, and then the call runs into its timeout.
        let _ = self.questions.send((host.to_owned(), port));
    }

    /// The next answer, if there is one.
    pub fn poll(&self) -> Option<Resolved> {
        self.answers.try_recv().ok()
    }
}

fn look_up(host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    match (host, port).to_socket_addrs() {
        Ok(addresses) => {
            let addresses: Vec<SocketAddr> = addresses.collect();
            if addresses.is_empty() { Err("the name has no address".to_owned()) } else { Ok(addresses) }
        }
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_and_wakes() {
        let (woken, wakes) = channel();
        let resolver = Resolver::start(move || woken.send(()).unwrap()).unwrap();
        resolver.ask("127.0.0.1", 443);
        wakes.recv().unwrap();
        let answer = resolver.poll().unwrap();
        assert_eq!(answer.result, Ok(vec![SocketAddr::from(([127, 0, 0, 1], 443))]));
        assert!(resolver.poll().is_none());
    }
}
