#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]
//! Load at a fixed rate: how long does a reply take, counted from when its request was due?
//!
//! `paced ADDRESS PATH TOKEN RATE CONNECTIONS SECONDS` sends one request each 1/RATE s, in turn on so many keep-alive
//! connections, and prints quantiles in microseconds as JSON. A request that is due while its connection still waits
//! is sent later and counted from its due time: a server that stalls is charged for every request that it held up
//! (no coordinated omission; the model is wrk2's). Spins instead of sleeping, since a timer's error is of the size of
//! what is measured. `benches/compare/run` starts it.

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::time::{Duration, Instant};

struct Client {
    stream: TcpStream,
    /// When the requests that wait for this connection were due; the first is under way if `asked`.
    due: VecDeque<Duration>,
    asked: bool,
    /// What has come of the reply.
    reply: Vec<u8>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, path, token, rate, connections, seconds] = arguments.as_slice() else {
        println!("paced ADDRESS PATH TOKEN RATE CONNECTIONS SECONDS (started by benches/compare/run)");
        return;
    };
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nX-KMS-Token: {token}\r\n\r\n");
    let (rate, connections): (f64, usize) = (rate.parse().unwrap(), connections.parse().unwrap());
    let lasts = Duration::from_secs(seconds.parse().unwrap());
    let mut poll = Poll::new().unwrap();
    let mut clients: Vec<Client> = (0..connections)
        .map(|number| {
            let stream = std::net::TcpStream::connect(address).unwrap();
            stream.set_nodelay(true).unwrap();
            stream.set_nonblocking(true).unwrap();
            let mut stream = TcpStream::from_std(stream);
            poll.registry().register(&mut stream, Token(number), Interest::READABLE).unwrap();
            Client { stream, due: VecDeque::new(), asked: false, reply: Vec::new() }
        })
        .collect();

    let due_at = |number: usize| Duration::from_secs_f64(number as f64 / rate);
    let total = (rate * lasts.as_secs_f64()) as usize;
    let mut took: Vec<u32> = Vec::with_capacity(total);
    let mut events = Events::with_capacity(connections);
    let (began, mut next) = (Instant::now(), 0_usize);
    while took.len() < total {
        let now = began.elapsed();
        while next < total && due_at(next) <= now {
            let client = &mut clients[next % connections];
            client.due.push_back(due_at(next));
            client.ask(request.as_bytes());
            next += 1;
        }
        poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
        for event in &events {
            let client = &mut clients[event.token().0];
            if client.replied() {
                let due = client.due.pop_front().unwrap();
                took.push(u32::try_from((began.elapsed() - due).as_micros()).unwrap_or(u32::MAX));
                client.asked = false;
                client.ask(request.as_bytes());
            }
        }
        assert!(
            began.elapsed() < lasts * 3,
            "only {} of {total} replies in three times the time",
            took.len()
        );
    }
    let ran_s = began.elapsed().as_secs_f64();
    took.sort_unstable();
    let quantile = |q: f64| took[((took.len() - 1) as f64 * q) as usize];
    let quantiles =
        [("p50", 0.5), ("p75", 0.75), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99), ("p99.9", 0.999)]
            .map(|(name, q)| format!("\"{name}\": {}", quantile(q)))
            .join(", ");
    println!("{{\"rate\": {:.0}, {quantiles}}}", total as f64 / ran_s);
}

impl Client {
    /// Sends the request that is due next, unless one is under way.
    fn ask(&mut self, request: &[u8]) {
        if !self.asked && !self.due.is_empty() {
            // The socket's buffer is empty: the last reply is there.
            assert_eq!(self.stream.write(request).unwrap(), request.len());
            self.asked = true;
        }
    }

    /// Reads on; says whether the reply is whole.
    fn replied(&mut self) -> bool {
        let mut bytes = [0; 8192];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => panic!("the server has closed"),
                Ok(count) => {
                    self.reply.extend_from_slice(&bytes[..count]);
                    if count < bytes.len() {
                        // Nothing more is there; edge-triggered epoll will tell when there is.
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        let Some(head) = self.reply.windows(4).position(|it| it == b"\r\n\r\n") else { return false };
        let text = std::str::from_utf8(&self.reply[..head]).unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        let length = text.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap();
        if self.reply.len() < head + 4 + length.parse::<usize>().unwrap() {
            return false;
        }
        self.reply.clear();
        true
    }
}
