#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
//! The floor under every server of one thread: `floor PORT FILE` answers whatever it reads with the bytes of FILE, and
//! does nothing else. What `benches/compare/run` measures of it is the kernel's and wrk's share.

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};

const LISTENER: Token = Token(usize::MAX);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [port, file] = arguments.as_slice() else {
        println!("floor PORT FILE (started by benches/compare/run)");
        return;
    };
    let reply = std::fs::read(file).unwrap();
    let mut listener = TcpListener::bind(format!("127.0.0.1:{port}").parse().unwrap()).unwrap();
    let mut poll = Poll::new().unwrap();
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE).unwrap();
    let (mut events, mut bytes) = (Events::with_capacity(1024), [0; 4096]);
    let mut streams: HashMap<Token, TcpStream> = HashMap::new();
    let mut next = 0;
    loop {
        poll.poll(&mut events, None).unwrap();
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((mut stream, _)) = listener.accept() {
                    poll.registry().register(&mut stream, Token(next), Interest::READABLE).unwrap();
                    streams.insert(Token(next), stream);
                    next += 1;
                }
                continue;
            }
            let Some(stream) = streams.get_mut(&event.token()) else { continue };
            match stream.read(&mut bytes) {
                Ok(1..) => _ = stream.write(&reply),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Ok(0) | Err(_) => _ = streams.remove(&event.token()),
            }
        }
    }
}
