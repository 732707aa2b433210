//! HTTP/1.1 for both services. hyper reads every request and writes every well-behaved reply; for anything
//! else the handler takes the connection over and decides each byte itself.

use crate::faults::{Framing, RawReply};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use std::future::{Future, poll_fn};
use std::io::{self, Write};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

/// Bodies beyond this are refused with 413: a secret has at most 30 KiB, encoded at most thrice that.
const BODY_BYTES_MAX: usize = 1 << 20;

/// A whole request.
pub(crate) struct Received {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Bytes,
}

impl Received {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// A reply of the usual kind.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn new(status: u16, content_type: &str, body: impl Into<Vec<u8>>) -> Reply {
        Reply { status, headers: vec![("content-type".into(), content_type.into())], body: body.into() }
    }

    pub(crate) fn with_header(mut self, name: &str, value: &str) -> Reply {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The bytes of the reply as the raw reply wants them, and whether the connection can go on after it.
    pub(crate) fn render(&self, raw: &RawReply) -> (Vec<u8>, bool) {
        let mut out = Vec::new();
        for status in &raw.interim {
            out.extend(format!("HTTP/1.1 {status} Interim\r\n\r\n").bytes());
        }
        let status = raw.status.unwrap_or(self.status);
        let reason =
            hyper::StatusCode::from_u16(status).ok().and_then(|s| s.canonical_reason()).unwrap_or("");
        out.extend(format!("HTTP/1.1 {status} {reason}\r\n").bytes());
        for (name, value) in self.headers.iter().chain(&raw.headers) {
            out.extend(format!("{name}: {value}\r\n").bytes());
        }
        let body = raw.body.as_deref().unwrap_or(&self.body);
        match raw.framing {
            Framing::ContentLength => {
                out.extend(format!("content-length: {}\r\n\r\n", body.len()).bytes());
                out.extend(body);
            }
            Framing::FalseLength(length) => {
                out.extend(format!("content-length: {length}\r\n\r\n").bytes());
                out.extend(body);
            }
            Framing::UntilClose => {
                out.extend(b"connection: close\r\n\r\n");
                out.extend(body);
            }
            Framing::Chunked(size) => {
                out.extend(b"transfer-encoding: chunked\r\n\r\n");
                for chunk in body.chunks(size.max(1)) {
                    out.extend(format!("{:x}\r\n", chunk.len()).bytes());
                    out.extend(chunk);
                    out.extend(b"\r\n");
                }
                out.extend(b"0\r\n\r\n");
            }
        }
        (out, matches!(raw.framing, Framing::ContentLength | Framing::Chunked(_)))
    }

    fn into_response(self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(Bytes::from(self.body)));
        *response.status_mut() = hyper::StatusCode::from_u16(self.status).unwrap_or_default();
        for (name, value) in &self.headers {
            // Names and values come from tests: one that is no header field is left out.
            if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                response.headers_mut().append(name, value);
            }
        }
        response
    }
}

/// What becomes of a request.
pub(crate) enum Outcome {
    Reply(Reply),
    TakeOver(TakeOver),
}

/// What to do with the bare connection.
#[derive(Debug, Clone)]
pub(crate) enum TakeOver {
    /// Write this, then go on serving.
    Write(Vec<u8>),
    /// Write this, then end the connection in order (TLS close_notify).
    WriteAndEnd(Vec<u8>),
    /// Write this, then close without close_notify, as a server that dies.
    WriteAndCut(Vec<u8>),
    /// Put this into a TLS record, send half of it, then close.
    HalfRecord(Vec<u8>),
    /// RST.
    Reset,
}

/// A connection, with bytes that hyper had read ahead when the handler took over.
pub(crate) struct Wire {
    read_ahead: Bytes,
    stream: Stream,
}

pub(crate) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    fn tcp(&self) -> &TcpStream {
        match self {
            Stream::Plain(tcp) => tcp,
            Stream::Tls(tls) => tls.get_ref().0,
        }
    }

    async fn half_record(self, bytes: &[u8]) -> io::Result<()> {
        let (mut tcp, sealed) = match self {
            Stream::Plain(tcp) => (tcp, bytes.to_vec()),
            Stream::Tls(tls) => {
                let (tcp, mut session) = tls.into_inner();
                session.writer().write_all(bytes)?;
                let mut sealed = Vec::new();
                while session.wants_write() {
                    session.write_tls(&mut sealed)?;
                }
                (tcp, sealed)
            }
        };
        let (half, _) = sealed.split_at(sealed.len() / 2);
        tcp.write_all(half).await
    }
}

/// The future of one request's outcome.
pub(crate) type OutcomeFuture = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// Serves one connection to its end. Errors of the transport are the client's business.
pub(crate) async fn serve(
    stream: Stream,
    handler: impl Fn(Received) -> OutcomeFuture + Send + Sync + 'static,
) {
    let handler = Arc::new(handler);
    let mut wire = Wire { read_ahead: Bytes::new(), stream };
    loop {
        // hyper gives the connection back when its service fails: that is how a handler takes over.
        let wanted = Arc::new(Mutex::new(None));
        let service = {
            let (handler, wanted) = (Arc::clone(&handler), Arc::clone(&wanted));
            service_fn(move |request| {
                let (handler, wanted) = (Arc::clone(&handler), Arc::clone(&wanted));
                Box::pin(async move {
                    let outcome = match receive(request).await? {
                        Ok(received) => handler(received).await,
                        Err(reply) => Outcome::Reply(reply),
                    };
                    match outcome {
                        Outcome::Reply(reply) => Ok(reply.into_response()),
                        Outcome::TakeOver(plan) => {
                            *wanted.lock().unwrap_or_else(PoisonError::into_inner) = Some(plan);
                            Err(io::Error::other("taken over"))
                        }
                    }
                })
            })
        };
        let mut http = hyper::server::conn::http1::Builder::new();
        let mut connection = http.auto_date_header(false).serve_connection(TokioIo::new(wire), service);
        let served = poll_fn(|cx| connection.poll_without_shutdown(cx)).await;
        let parts = connection.into_parts();
        wire = parts.io.into_inner();
        let plan = wanted.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(plan) = plan else {
            if served.is_ok() {
                let _ = wire.shutdown().await;
            }
            return;
        };
        match take_over(wire, plan).await {
            Ok(Some(goes_on)) => wire = Wire { read_ahead: parts.read_buf, ..goes_on },
            Ok(None) | Err(_) => return,
        }
    }
}

async fn take_over(mut wire: Wire, plan: TakeOver) -> io::Result<Option<Wire>> {
    match plan {
        TakeOver::Write(bytes) => {
            wire.write_all(&bytes).await?;
            wire.flush().await?;
            return Ok(Some(wire));
        }
        TakeOver::WriteAndEnd(bytes) => {
            wire.write_all(&bytes).await?;
            wire.shutdown().await?;
        }
        TakeOver::WriteAndCut(bytes) => {
            wire.write_all(&bytes).await?;
            wire.flush().await?;
        }
        TakeOver::HalfRecord(bytes) => wire.stream.half_record(&bytes).await?,
        TakeOver::Reset => wire.stream.tcp().set_zero_linger()?,
    }
    Ok(None)
}

/// The whole request, or the reply that refuses it.
async fn receive(request: Request<Incoming>) -> io::Result<Result<Received, Reply>> {
    let (head, body) = request.into_parts();
    let Ok(body) = Limited::new(body, BODY_BYTES_MAX).collect().await else {
        return Ok(Err(Reply::new(413, "text/plain", "body too large\n")));
    };
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    Ok(Ok(Received {
        method: head.method.as_str().to_owned(),
        path: head.uri.path().to_owned(),
        query: head.uri.query().unwrap_or_default().to_owned(),
        headers: head.headers.iter().map(|(n, v)| (n.as_str().to_owned(), text(v))).collect(),
        body: body.to_bytes(),
    }))
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.read_ahead.is_empty() {
            let count = self.read_ahead.len().min(buf.remaining());
            buf.put_slice(&self.read_ahead.split_to(count));
            return Poll::Ready(Ok(()));
        }
        match &mut self.stream {
            Stream::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Stream::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Stream::Tls(tls) => Pin::new(tls).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Stream::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Stream::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}
