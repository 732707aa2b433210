//! A small HTTP client that shows what came over the wire. Every read has a deadline.

use std::fmt::Write as _;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// Longer than any answer of the agent takes (8 s for a secret that cannot be had), however slow the host is.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// A request head. `Host: localhost` unless `headers` has one.
pub fn head(method: &str, target: &str, headers: &[(&str, &str)]) -> String {
    let mut out = format!("{method} {target} HTTP/1.1\r\n");
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        out += "Host: localhost\r\n";
    }
    for (name, value) in headers {
        let _ = write!(out, "{name}: {value}\r\n");
    }
    out + "\r\n"
}

/// A reply.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    /// `HTTP/1.1`.
    pub version: String,
    /// As they came.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// From the last [`Connection::send`] to the reply's last byte.
    pub elapsed: Duration,
}

impl Reply {
    /// The value of a header; panics if there are two.
    #[track_caller]
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut all = self.headers.iter().filter(|(it, _)| it.eq_ignore_ascii_case(name));
        let first = all.next();
        assert!(all.next().is_none(), "two headers {name}: {:?}", self.headers);
        first.map(|(_, value)| value.as_str())
    }

    /// `X-Cache`, or nothing.
    #[track_caller]
    pub fn x_cache(&self) -> &str {
        self.header("X-Cache").unwrap_or("")
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        match serde_json::from_slice(&self.body) {
            Ok(json) => json,
            Err(error) => panic!("{error}: {} {}", self.status, self.text()),
        }
    }

    /// A string of the JSON body, or nothing.
    #[track_caller]
    pub fn field(&self, name: &str) -> String {
        self.json().get(name).and_then(|it| it.as_str()).unwrap_or_default().to_owned()
    }

    /// `SecretData`.
    #[track_caller]
    pub fn data(&self) -> String {
        assert_eq!(self.status, 200, "{}", self.text());
        self.field("SecretData")
    }

    /// `status Code`, or `200 X-Cache`: what most tests want to know.
    #[track_caller]
    pub fn verdict(&self) -> String {
        let what = if self.status == 200 { self.x_cache().to_owned() } else { self.field("Code") };
        format!("{} {what}", self.status)
    }

    /// Whether the server will close the connection.
    #[track_caller]
    pub fn closes(&self) -> bool {
        self.header("Connection").is_some_and(|it| it.eq_ignore_ascii_case("close"))
    }
}

/// A connection.
pub struct Connection {
    stream: TcpStream,
    /// Read and not yet used.
    bytes: Vec<u8>,
    sent: Instant,
}

impl Connection {
    #[track_caller]
    pub fn to(address: impl ToSocketAddrs) -> Connection {
        Connection::try_to(address).expect("a connection")
    }

    pub fn try_to(address: impl ToSocketAddrs) -> io::Result<Connection> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(READ_TIMEOUT))?;
        stream.set_write_timeout(Some(READ_TIMEOUT))?;
        Ok(Connection { stream, bytes: Vec::new(), sent: Instant::now() })
    }

    /// Sends bytes. Panics if the agent has gone.
    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).expect("the agent takes it");
    }

    pub fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.sent = Instant::now();
        self.stream.write_all(bytes.as_ref())
    }

    /// Sends an end; reading goes on.
    #[track_caller]
    pub fn half_close(&self) {
        self.stream.shutdown(Shutdown::Write).expect("a half-close");
    }

    /// The reply to a GET.
    pub fn reply(&mut self) -> io::Result<Reply> {
        self.reply_to("GET")
    }

    /// The reply to a request of this method.
    pub fn reply_to(&mut self, method: &str) -> io::Result<Reply> {
        let bad = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
        let end = loop {
            if let Some(at) = self.bytes.windows(4).position(|it| it == b"\r\n\r\n") {
                break at;
            }
            self.fill()?;
        };
        let head = String::from_utf8_lossy(&self.bytes[..end]).into_owned();
        self.bytes.drain(..end + 4);
        let mut lines = head.split("\r\n");
        let mut first = lines.next().unwrap_or_default().splitn(3, ' ');
        let version = first.next().unwrap_or_default().to_owned();
        let status = first.next().and_then(|it| it.parse().ok()).ok_or_else(|| bad(&head))?;
        let mut headers = Vec::new();
        for line in lines {
            let (name, value) = line.split_once(':').ok_or_else(|| bad(&head))?;
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
        let length = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        // The agent frames each of its replies by length.
        let length: usize =
            length.and_then(|(_, value)| value.parse().ok()).ok_or_else(|| bad("no Content-Length"))?;
        let length = if method == "HEAD" { 0 } else { length };
        while self.bytes.len() < length {
            self.fill()?;
        }
        let body = self.bytes.drain(..length).collect();
        Ok(Reply { status, version, headers, body, elapsed: self.sent.elapsed() })
    }

    /// Whatever comes until the agent closes the connection. A reset is an error.
    pub fn rest(&mut self) -> io::Result<Vec<u8>> {
        self.stream.read_to_end(&mut self.bytes)?;
        Ok(std::mem::take(&mut self.bytes))
    }

    /// Whether the agent closes without another byte.
    pub fn is_at_end(&mut self) -> bool {
        self.rest().is_ok_and(|rest| rest.is_empty())
    }

    /// Whether a byte waits, or an end; does not wait for one.
    pub fn has_something(&self) -> bool {
        self.stream.set_nonblocking(true).expect("a mode");
        let peeked = self.stream.peek(&mut [0]);
        self.stream.set_nonblocking(false).expect("a mode");
        !self.bytes.is_empty() || peeked.is_ok()
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut chunk = [0; 16 * 1024];
        let count = loop {
            match self.stream.read(&mut chunk) {
                // A read with a timeout is not taken up again by itself when the process was stopped meanwhile.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => break outcome?,
            }
        };
        match count {
            0 => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("closed after {:?}", String::from_utf8_lossy(&self.bytes)),
            )),
            count => {
                self.bytes.extend_from_slice(&chunk[..count]);
                Ok(())
            }
        }
    }
}
