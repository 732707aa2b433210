//! The TLS pump (`conn::tls`) and a whole call over it (`conn::outbound`), against a rustls server in memory:
//! no socket and no clock, so that every byte can be cut off from the next. At the end, what the real binary trusts.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{Agent, Setup, emulator, wait_until};
use kms_agent::call::{Call, CallErrorKind, CallId, Service};
use kms_agent::config::HostPort;
use kms_agent::conn::outbound::{Outbound, Step};
use kms_agent::conn::tls::{Tls, client_config};
use kms_agent::http::response::Response;
use kms_agent::time::Mono;
use kms_emulator::{BadCertificate, KmsMode};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose};
use rustix::process::Signal;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::{TLS12, TLS13};
use rustls::{
    ClientConfig, HandshakeKind, NamedGroup, ServerConfig, ServerConnection, SupportedProtocolVersion,
};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

const HOST: &str = "kms-vpc.cn-hangzhou.aliyuncs.com";
const REQUEST: &[u8] = b"POST /?SecretName=a HTTP/1.1\r\nhost: kms\r\ncontent-length: 0\r\n\r\n";
const REPLY: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{\"a\": \"bcd\"}";

// ---- The other side ----

/// A CA and what it has issued.
struct World {
    ca: CertifiedIssuer<'static, KeyPair>,
}

impl World {
    fn new() -> World {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        // All CAs here have the same name: only keys tell them apart.
        params.distinguished_name.push(DnType::CommonName, "test CA");
        World { ca: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    fn client(&self) -> Arc<ClientConfig> {
        client_config(Some(self.ca.pem().as_bytes())).unwrap()
    }

    /// The same without memory: each of its handshakes is a full one.
    fn forgetful_client(&self) -> Arc<ClientConfig> {
        let mut config = (*self.client()).clone();
        config.resumption = Resumption::disabled();
        Arc::new(config)
    }

    fn server_of(
        &self,
        names: &[&str],
        versions: &[&'static SupportedProtocolVersion],
        expired: bool,
    ) -> Arc<ServerConfig> {
        self.server_by(rustls::crypto::ring::default_provider(), names, versions, expired)
    }

    fn server_by(
        &self,
        provider: CryptoProvider,
        names: &[&str],
        versions: &[&'static SupportedProtocolVersion],
        expired: bool,
    ) -> Arc<ServerConfig> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.use_authority_key_identifier_extension = true;
        if expired {
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let certificate: CertificateDer<'static> = params.signed_by(&key, &self.ca).unwrap().der().clone();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(versions)
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        Arc::new(config)
    }

    fn server(&self) -> Arc<ServerConfig> {
        self.server_of(&[HOST, "127.0.0.1", "::1"], &[&TLS13, &TLS12], false)
    }
}

/// A server's end of a connection.
struct Peer {
    session: ServerConnection,
    received: Vec<u8>,
    client_has_closed: bool,
}

impl Peer {
    fn new(config: &Arc<ServerConfig>) -> Peer {
        let session = ServerConnection::new(Arc::clone(config)).unwrap();
        Peer { session, received: Vec::new(), client_has_closed: false }
    }

    fn on_bytes(&mut self, mut bytes: &[u8]) -> Result<(), rustls::Error> {
        while !bytes.is_empty() {
            let taken = self.session.read_tls(&mut bytes).unwrap();
            let state = self.session.process_new_packets()?;
            self.client_has_closed |= state.peer_has_closed();
            let mut plaintext = vec![0; state.plaintext_bytes_to_read()];
            self.session.reader().read_exact(&mut plaintext).unwrap();
            self.received.extend(plaintext);
            if taken == 0 {
                break;
            }
        }
        Ok(())
    }

    fn send(&mut self, plaintext: &[u8]) {
        self.session.set_buffer_limit(None);
        self.session.writer().write_all(plaintext).unwrap();
    }

    fn output(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        while self.session.wants_write() {
            self.session.write_tls(&mut out).unwrap();
        }
        out
    }
}

/// How the bytes of one direction are cut into reads.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Nowhere,
    Every(usize),
    /// Once, after this many bytes of the whole stream.
    At(usize),
    /// After `phase` bytes of the whole stream, and after each [`COMB`] more.
    Comb {
        phase: usize,
    },
}

/// The combs of all phases below this cut each byte from the next once, in so few handshakes.
const COMB: usize = 61;
/// Cuts that stand alone come at this distance.
const LONE_CUTS: usize = 29;

/// Runs a conversation under cuts at every byte of both directions. `run` gives their lengths, the client's
/// first.
fn under_all_cuts(run: impl Fn((Cut, Cut)) -> (usize, usize)) {
    let (out_len, in_len) = run(UNCUT);
    assert!(out_len > COMB && in_len > COMB);
    for size in [1, 2, 3, 64] {
        run((Cut::Every(size), Cut::Every(size)));
    }
    run((Cut::Every(1), Cut::Nowhere));
    run((Cut::Nowhere, Cut::Every(1)));
    for phase in 0..COMB {
        run((Cut::Comb { phase }, Cut::Comb { phase }));
    }
    for at in (1..out_len).step_by(LONE_CUTS) {
        run((Cut::At(at), Cut::Nowhere));
    }
    for at in (1..in_len).step_by(LONE_CUTS) {
        run((Cut::Nowhere, Cut::At(at)));
    }
}

/// One direction of a connection.
struct Stream {
    cut: Cut,
    passed: usize,
}

impl Stream {
    fn new(cut: Cut) -> Stream {
        Stream { cut, passed: 0 }
    }

    fn pieces<'a>(&mut self, bytes: &'a [u8]) -> Vec<&'a [u8]> {
        let from = self.passed;
        self.passed += bytes.len();
        match self.cut {
            Cut::Nowhere => vec![bytes],
            Cut::Every(size) => bytes.chunks(size).collect(),
            Cut::At(at) if at > from && at < self.passed => {
                let (before, after) = bytes.split_at(at - from);
                vec![before, after]
            }
            Cut::At(_) => vec![bytes],
            Cut::Comb { phase } => {
                let first = (phase + COMB - from % COMB) % COMB;
                let (before, after) = bytes.split_at(first.min(bytes.len()));
                let teeth = after.chunks(COMB);
                std::iter::once(before).chain(teeth).filter(|piece| !piece.is_empty()).collect()
            }
        }
    }
}

/// A handshake, a request and its reply; gives the lengths of both directions, the client's first.
fn converse(
    (client, server): (&mut Tls, &mut Peer),
    (request, reply): (&[u8], &[u8]),
    (out_cut, in_cut): (Cut, Cut),
) -> (usize, usize) {
    let (mut outward, mut inward) = (Stream::new(out_cut), Stream::new(in_cut));
    let (mut asked, mut replied, mut plaintext) = (false, false, Vec::new());
    loop {
        if !asked && !client.is_handshaking() {
            client.send(request).unwrap();
            asked = true;
        }
        let mut out = Vec::new();
        client.poll_ciphertext(&mut out);
        for piece in outward.pieces(&out) {
            server.on_bytes(piece).unwrap();
        }
        if !replied && server.received.len() >= request.len() {
            assert_eq!(server.received, request);
            server.send(reply);
            replied = true;
        }
        let back = server.output();
        assert!(!(out.is_empty() && back.is_empty()), "stuck: {out_cut:?} {in_cut:?}");
        for piece in inward.pieces(&back) {
            client.on_ciphertext(piece, &mut plaintext).unwrap();
        }
        if plaintext.len() >= reply.len() {
            assert!(plaintext == reply, "{out_cut:?} {in_cut:?}");
            return (outward.passed, inward.passed);
        }
    }
}

/// Pumps until nobody has anything to say, or the client gives up.
fn pump(client: &mut Tls, server: &mut Peer, plaintext: &mut Vec<u8>) -> Result<(), String> {
    loop {
        let mut out = Vec::new();
        client.poll_ciphertext(&mut out);
        server.on_bytes(&out).unwrap();
        let back = server.output();
        if out.is_empty() && back.is_empty() {
            return Ok(());
        }
        client.on_ciphertext(&back, plaintext).map_err(|error| error.to_string())?;
    }
}

/// A connection whose handshake is done.
fn connected(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> (Tls, Peer) {
    let mut client = Tls::new(Arc::clone(client), HOST).unwrap();
    let mut server = Peer::new(server);
    pump(&mut client, &mut server, &mut Vec::new()).unwrap();
    assert!(!client.is_handshaking() && !server.session.is_handshaking());
    (client, server)
}

// ---- The pump ----

#[test]
fn a_conversation_survives_any_cut() {
    let world = World::new();
    let client = world.forgetful_client();
    for versions in [&[&TLS13][..], &[&TLS12]] {
        let server = world.server_of(&[HOST], versions, false);
        under_all_cuts(|cuts| {
            let mut client = Tls::new(Arc::clone(&client), HOST).unwrap();
            converse((&mut client, &mut Peer::new(&server)), (REQUEST, REPLY), cuts)
        });
    }
}

#[test]
fn plaintext_may_be_larger_than_a_record() {
    let world = World::new();
    let (client, server) = (world.client(), world.server());
    let bytes =
        |count: u32| -> Vec<u8> { (0..count).map(|n| n.to_be_bytes()[3] ^ n.to_be_bytes()[2]).collect() };
    let (request, reply) = (bytes(50_000), bytes(300_000));
    for cut in [Cut::Nowhere, Cut::Every(1000), Cut::Every(16_384 + 22)] {
        let mut tls = Tls::new(Arc::clone(&client), HOST).unwrap();
        converse((&mut tls, &mut Peer::new(&server)), (&request, &reply), (cut, cut));
    }
    let (mut tls, _) = connected(&client, &server);
    assert!(tls.send(&vec![0; 1 << 20]).is_err(), "what cannot be buffered is refused, not lost");
}

#[test]
fn the_second_connection_resumes_the_session() {
    let world = World::new();
    for versions in [&[&TLS13][..], &[&TLS12]] {
        let (client, server) = (world.client(), world.server_of(&[HOST], versions, false));
        for expected in [HandshakeKind::Full, HandshakeKind::Resumed, HandshakeKind::Resumed] {
            let (_, peer) = connected(&client, &server);
            assert_eq!(peer.session.handshake_kind(), Some(expected));
        }
        let (_, peer) = connected(&world.client(), &server);
        assert_eq!(peer.session.handshake_kind(), Some(HandshakeKind::Full), "another configuration");
    }
}

#[test]
fn the_key_exchange_is_the_best_that_both_know() {
    let world = World::new();
    let group = |server: &Arc<ServerConfig>| {
        let (_, peer) = connected(&world.client(), server);
        peer.session.negotiated_key_exchange_group().unwrap().name()
    };
    assert_eq!(group(&world.server()), NamedGroup::X25519);
    #[cfg(feature = "post-quantum")]
    {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let server = world.server_by(provider, &[HOST], &[&TLS13], false);
        assert_eq!(group(&server), NamedGroup::X25519MLKEM768);
    }
}

#[test]
fn a_proper_end_is_told_from_a_bare_one() {
    let world = World::new();
    let (mut client, mut server) = connected(&world.client(), &world.server());
    let mut plaintext = Vec::new();
    server.send(b"last words");
    pump(&mut client, &mut server, &mut plaintext).unwrap();
    assert!(!client.peer_has_closed(), "so a bare end now would be a cut");
    server.send(b", truly");
    server.session.send_close_notify();
    let mut end = server.output();
    // What follows a close_notify is not the server's to say.
    end.extend(b"\x17\x03\x03\x00\x05hello");
    for byte in end {
        client.on_ciphertext(&[byte], &mut plaintext).unwrap();
    }
    assert_eq!(plaintext, b"last words, truly");
    assert!(client.peer_has_closed());

    let (mut client, mut server) = connected(&world.client(), &world.server());
    client.close();
    pump(&mut client, &mut server, &mut plaintext).unwrap();
    assert!(server.client_has_closed);
}

/// Lets the client meet a server that it must not trust; gives its complaint, after checking that it told the
/// server so and nothing else.
fn refused(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>, host: &str) -> String {
    let mut client = Tls::new(Arc::clone(client), host).unwrap();
    let mut server = Peer::new(server);
    // Even what was to be sent already stays here.
    client.send(REQUEST).unwrap();
    let complaint = pump(&mut client, &mut server, &mut Vec::new()).unwrap_err();
    let mut alert = Vec::new();
    client.poll_ciphertext(&mut alert);
    let heard = server.on_bytes(&alert).unwrap_err();
    assert!(matches!(heard, rustls::Error::AlertReceived(_)), "{heard}");
    assert!(server.received.is_empty(), "nothing was sent");
    complaint
}

#[test]
fn servers_that_must_not_be_trusted_are_refused() {
    let (world, other) = (World::new(), World::new());
    let client = world.client();
    let versions: [&[&'static SupportedProtocolVersion]; 2] = [&[&TLS13], &[&TLS12]];
    for versions in versions {
        let complaint = refused(&client, &other.server_of(&[HOST], versions, false), HOST);
        assert!(complaint.contains("the server's certificate does not verify"), "{complaint}");
        let complaint = refused(&client, &world.server_of(&["kms.invalid"], versions, false), HOST);
        assert!(complaint.contains("does not verify") && complaint.contains(HOST), "{complaint}");
        let complaint = refused(&client, &world.server_of(&[HOST], versions, true), HOST);
        assert!(complaint.contains("expired"), "{complaint}");
        // Without a CaFile only the web's roots count, and the complaint says what to do.
        let complaint =
            refused(&client_config(None).unwrap(), &world.server_of(&[HOST], versions, false), HOST);
        assert!(complaint.contains("CaFile"), "{complaint}");
    }
    // An address is not a name, and another address not this one.
    refused(&client, &world.server(), "127.0.0.2");
    refused(&client, &world.server_of(&[HOST], &[&TLS13], false), "127.0.0.1");
    for host in ["127.0.0.1", "::1"] {
        let mut tls = Tls::new(Arc::clone(&client), host).unwrap();
        let cuts = (Cut::Nowhere, Cut::Nowhere);
        converse((&mut tls, &mut Peer::new(&world.server())), (REQUEST, REPLY), cuts);
    }
    assert!(Tls::new(client, "no name").is_err());
}

#[test]
fn what_is_not_tls_is_refused() {
    let world = World::new();
    let garbage: [(&[u8], &str); 6] = [
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", "corrupt message"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "corrupt message"),
        (&[0; 64], "corrupt message"),
        (&[0xff; 100_000], "corrupt message"),
        // handshake_failure and internal_error, fatal.
        (b"\x15\x03\x03\x00\x02\x02\x28", "HandshakeFailure"),
        (b"\x15\x03\x03\x00\x02\x02\x50", "InternalError"),
    ];
    for (bytes, words) in garbage {
        for cut in [Cut::Nowhere, Cut::Every(1)] {
            let mut client = Tls::new(world.client(), HOST).unwrap();
            client.poll_ciphertext(&mut Vec::new());
            let mut plaintext = Vec::new();
            let mut stream = Stream::new(cut);
            let complaint = stream
                .pieces(bytes)
                .into_iter()
                .find_map(|piece| client.on_ciphertext(piece, &mut plaintext).err());
            let complaint = complaint.unwrap_or_else(|| panic!("taken: {:?}", &bytes[..7])).to_string();
            assert!(complaint.to_lowercase().contains(&words.to_lowercase()), "{complaint}");
            assert!(plaintext.is_empty());
        }
    }
}

#[test]
fn a_changed_byte_of_a_record_is_noticed() {
    let world = World::new();
    let (client, server) = (world.client(), world.server());
    for at in [5, 20, REPLY.len() + 10] {
        let (mut client, mut server) = connected(&client, &server);
        server.send(REPLY);
        let mut record = server.output();
        record[at] ^= 1;
        let mut plaintext = Vec::new();
        assert!(client.on_ciphertext(&record, &mut plaintext).is_err());
        assert!(plaintext.is_empty(), "nothing of it is handed on");
    }
}

#[test]
fn ca_files() {
    let (one, other) = (World::new(), World::new());
    let both = format!("# two of them\n{}\n{}", one.ca.pem(), other.ca.pem());
    let client = client_config(Some(both.as_bytes())).unwrap();
    for world in [&one, &other] {
        connected(&client, &world.server());
    }
    let broken = one.ca.pem().replace("-----END CERTIFICATE-----", "");
    for (pem, words) in [
        ("", "no PEM certificate"),
        ("nothing to see", "no PEM certificate"),
        (broken.as_str(), "not PEM"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "cannot be used"),
    ] {
        let complaint = client_config(Some(pem.as_bytes())).unwrap_err().to_string();
        assert!(complaint.contains(words), "{pem}: {complaint}");
    }
}

// ---- A whole call ----

fn at_ms(ms: u64) -> Mono {
    Mono::from_micros(ms * 1000)
}

fn call(id: u64) -> Call {
    let origin = Rc::new(HostPort { host: HOST.to_owned(), port: 443 });
    Call { id: CallId(id), service: Service::Kms, origin, deadline: Mono::NEVER }
}

fn address(last: u8) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, last], 443))
}

/// What a call came to, without what only the event loop does.
#[derive(Debug)]
enum Outcome {
    Replied {
        id: u64,
        response: Response,
        close: bool,
    },
    Failed(CallErrorKind, String),
    Again(u64),
    Closed,
    /// Nothing more comes of the bytes there are.
    Waits,
}

/// An outbound connection and its server, with the wire between them.
struct Line {
    outbound: Outbound,
    peer: Peer,
    outward: Stream,
    inward: Stream,
    /// What the server answers as soon as it has the whole request.
    reply: Vec<u8>,
    then_close: bool,
    requests: usize,
    now: Mono,
}

impl Line {
    /// Connected, its handshake begun.
    fn new(
        client: &Arc<ClientConfig>,
        server: &Arc<ServerConfig>,
        reply: &[u8],
        (out, inward): (Cut, Cut),
    ) -> Line {
        let now = at_ms(0);
        let mut outbound = Outbound::new(call(1), now);
        assert!(outbound.is_resolving(HOST, 443) && !outbound.is_resolving(HOST, 80));
        let step = outbound.on_resolved(&Ok(vec![address(1)]), now);
        assert!(matches!(step, Step::Connect(it) if it == address(1)), "{step:?}");
        assert!(outbound.is_connecting());
        let step = outbound.on_connected(Some(Arc::clone(client)), now);
        assert!(matches!(step, Step::Wait), "{step:?}");
        assert!(!outbound.pending().is_empty(), "a ClientHello");
        Line {
            outbound,
            peer: Peer::new(server),
            outward: Stream::new(out),
            inward: Stream::new(inward),
            reply: reply.to_vec(),
            then_close: false,
            requests: 0,
            now,
        }
    }

    /// Carries bytes until something comes of it.
    fn run(&mut self) -> Outcome {
        loop {
            let out = self.outbound.pending().to_vec();
            for piece in self.outward.pieces(&out) {
                assert!(self.outbound.pending().starts_with(piece), "in order");
                self.peer.on_bytes(piece).unwrap();
                self.outbound.on_sent(piece.len());
            }
            assert!(self.outbound.pending().is_empty());
            if self.peer.received == REQUEST {
                self.peer.received.clear();
                self.peer.send(&self.reply);
                if self.then_close {
                    self.peer.session.send_close_notify();
                }
            }
            let back = self.peer.output();
            if out.is_empty() && back.is_empty() {
                return Outcome::Waits;
            }
            for piece in self.inward.pieces(&back) {
                let step = self.outbound.on_bytes(piece, self.now);
                if let Some(outcome) = self.outcome(step) {
                    return outcome;
                }
            }
        }
    }

    fn outcome(&mut self, step: Step) -> Option<Outcome> {
        match step {
            Step::Wait => None,
            Step::SendRequest => {
                self.requests += 1;
                self.outbound.send(REQUEST);
                None
            }
            Step::Replied { call, response, close } => {
                Some(Outcome::Replied { id: call.id.0, response, close })
            }
            Step::Failed(_, error) => Some(Outcome::Failed(error.kind, error.message)),
            Step::Again(call) => Some(Outcome::Again(call.id.0)),
            Step::Closed => Some(Outcome::Closed),
            Step::Connect(address) => panic!("connect {address}?"),
        }
    }

    /// The socket comes to its end.
    fn end(&mut self, why: Option<io::ErrorKind>) -> Outcome {
        let step = self.outbound.on_end(why.map(io::Error::from).as_ref(), self.now);
        self.outcome(step).unwrap_or(Outcome::Waits)
    }

    /// Takes another call after the first.
    fn ask_again(&mut self, id: u64) {
        assert!(self.outbound.is_idle_for(&call(id)));
        self.outbound.reuse(call(id), self.now);
        self.outbound.send(REQUEST);
    }
}

#[track_caller]
fn assert_replied(outcome: Outcome, expected_id: u64, expected_close: bool) {
    match outcome {
        Outcome::Replied { id, response, close } => {
            assert_eq!((id, response.status, close), (expected_id, 200, expected_close));
            assert_eq!(*response.body, b"{\"a\": \"bcd\"}");
        }
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn assert_failed(outcome: Outcome, expected: CallErrorKind, words: &str) {
    match outcome {
        Outcome::Failed(kind, message) => {
            assert_eq!(kind, expected, "{message}");
            assert!(message.contains(words) && message.contains(&format!("{HOST}:443")), "{message}");
        }
        other => panic!("{other:?}"),
    }
}

const UNCUT: (Cut, Cut) = (Cut::Nowhere, Cut::Nowhere);

#[test]
fn a_call_survives_any_cut_and_leaves_a_connection_to_use_again() {
    let world = World::new();
    let (client, server) = (world.forgetful_client(), world.server());
    under_all_cuts(|cuts| {
        let mut line = Line::new(&client, &server, REPLY, cuts);
        assert_replied(line.run(), 1, false);
        assert!(line.outbound.is_idle());
        line.ask_again(2);
        assert_replied(line.run(), 2, false);
        assert_eq!(line.requests, 1, "the second went out without being asked for");
        (line.outward.passed, line.inward.passed)
    });
}

#[test]
fn a_reply_without_a_length_ends_with_close_notify_only() {
    let world = World::new();
    let (client, server) = (world.client(), world.server());
    let until_close = b"HTTP/1.1 200 OK\r\n\r\n{\"a\": \"bcd\"}";
    for cut in [Cut::Nowhere, Cut::Every(1)] {
        let mut line = Line::new(&client, &server, until_close, (cut, cut));
        line.then_close = true;
        assert_replied(line.run(), 1, true);
        // A bare end could be anybody's on the way: half a secret must not pass for a whole one.
        let mut line = Line::new(&client, &server, until_close, (cut, cut));
        assert!(matches!(line.run(), Outcome::Waits));
        assert_failed(line.end(None), CallErrorKind::InvalidResponse, "before the reply was complete");
    }
}

#[test]
fn ends_mean_what_the_call_had_come_to() {
    let world = World::new();
    let (client, server) = (world.client(), world.server());
    let reset = Some(io::ErrorKind::ConnectionReset);
    // In the handshake, and before the reply.
    let mut line = Line::new(&client, &server, REPLY, UNCUT);
    assert_failed(line.end(None), CallErrorKind::Unreachable, "TLS handshake with");
    let mut line = Line::new(&client, &server, b"", UNCUT);
    assert!(matches!(line.run(), Outcome::Waits));
    assert_failed(line.end(reset), CallErrorKind::Unreachable, "reply of");
    // Amid the reply: the head, or half the body.
    for cut in [10, REPLY.len() - 3] {
        for why in [None, reset] {
            let mut line = Line::new(&client, &server, &REPLY[..cut], UNCUT);
            assert!(matches!(line.run(), Outcome::Waits));
            assert_failed(line.end(why), CallErrorKind::InvalidResponse, "reply of");
        }
        let mut line = Line::new(&client, &server, &REPLY[..cut], UNCUT);
        line.then_close = true;
        assert_failed(line.run(), CallErrorKind::InvalidResponse, "reply of");
    }
    // After it: an idle connection closes, and one used again had died unnoticed.
    for why in [None, reset] {
        let mut line = Line::new(&client, &server, REPLY, UNCUT);
        assert_replied(line.run(), 1, false);
        assert!(matches!(line.end(why), Outcome::Closed));
        let mut line = Line::new(&client, &server, REPLY, UNCUT);
        assert_replied(line.run(), 1, false);
        line.ask_again(2);
        assert!(matches!(line.end(why), Outcome::Again(2)));
    }
    let mut line = Line::new(&client, &server, REPLY, UNCUT);
    assert_replied(line.run(), 1, false);
    line.ask_again(2);
    line.peer.session.send_close_notify();
    let bytes = line.peer.output();
    let step = line.outbound.on_bytes(&bytes, line.now);
    assert!(matches!(step, Step::Again(call) if call.id.0 == 2), "a close_notify says the same");
    // Once a byte of the reply was there, KMS has acted on the request: it is not repeated blindly.
    let mut line = Line::new(&client, &server, REPLY, UNCUT);
    assert_replied(line.run(), 1, false);
    line.ask_again(2);
    line.reply = REPLY[..20].to_vec();
    assert!(matches!(line.run(), Outcome::Waits));
    assert_failed(line.end(None), CallErrorKind::InvalidResponse, "reply of");
}

#[test]
fn replies_that_spoil_their_connection() {
    let world = World::new();
    let (client, server) = (world.client(), world.server());
    let closing =
        [b"HTTP/1.1 200 OK\r\nConnection: close\r\n", &REPLY[b"HTTP/1.1 200 OK\r\n".len()..]].concat();
    let surplus = [REPLY, b"HTTP/1.1 200 OK\r\n"].concat();
    for reply in [closing, surplus] {
        let mut line = Line::new(&client, &server, &reply, UNCUT);
        assert_replied(line.run(), 1, true);
    }
    let mut line = Line::new(&client, &server, b"SSH-2.0-OpenSSH_9.9\r\n", UNCUT);
    assert_failed(line.run(), CallErrorKind::InvalidResponse, "reply of");
    // Bytes that nobody asked for.
    let mut line = Line::new(&client, &server, REPLY, UNCUT);
    assert_replied(line.run(), 1, false);
    line.peer.send(REPLY);
    assert!(matches!(line.run(), Outcome::Closed));
    // A record that was changed on its way.
    let mut line = Line::new(&client, &server, b"", UNCUT);
    assert!(matches!(line.run(), Outcome::Waits));
    line.peer.send(REPLY);
    let mut bytes = line.peer.output();
    bytes[20] ^= 1;
    let step = line.outbound.on_bytes(&bytes, line.now);
    assert!(matches!(step, Step::Failed(..)), "{step:?}");
}

#[test]
fn a_server_that_must_not_be_trusted_gets_no_request() {
    let (world, other) = (World::new(), World::new());
    for cut in [Cut::Nowhere, Cut::Every(1)] {
        let mut line = Line::new(&world.client(), &other.server(), REPLY, (cut, cut));
        assert_failed(line.run(), CallErrorKind::Unreachable, "the server's certificate does not verify");
        assert_eq!(line.requests, 0);
        let alert = line.outbound.pending().to_vec();
        assert!(line.peer.on_bytes(&alert).is_err(), "it is told why");
        assert!(line.peer.received.is_empty());
    }
}

#[test]
fn addresses_are_tried_one_after_the_other() {
    let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
    let mut outbound = Outbound::new(call(1), at_ms(0));
    let step = outbound.on_resolved(&Ok(vec![address(1), address(2), address(3)]), at_ms(10));
    assert!(matches!(step, Step::Connect(it) if it == address(1)));
    assert_eq!(outbound.deadline(), at_ms(2010), "2 s for each");
    let step = outbound.on_connect_failed(&refused, at_ms(20));
    assert!(matches!(step, Step::Connect(it) if it == address(2)));
    assert_eq!(outbound.deadline(), at_ms(2020));
    let step = outbound.on_time(at_ms(2020));
    assert!(matches!(step, Step::Connect(it) if it == address(3)));
    let Step::Failed(_, error) = outbound.on_connect_failed(&refused, at_ms(2030)) else { panic!() };
    assert_eq!(error.kind, CallErrorKind::Unreachable);
    assert_eq!(error.message, format!("connect {HOST}:443: connection refused"));

    for (result, words) in
        [(Ok(vec![]), "the name has no address"), (Err("no such name".to_owned()), "no such name")]
    {
        let Step::Failed(_, error) = Outbound::new(call(1), at_ms(0)).on_resolved(&result, at_ms(0)) else {
            panic!()
        };
        assert_eq!(error.message, format!("resolve {HOST}:443: {words}"));
    }
}

#[test]
fn each_stage_has_its_time() {
    let world = World::new();
    let (client, server) = (world.client(), world.server());
    let timed_out = |step: Step, message: &str| match step {
        Step::Failed(_, error) => {
            assert_eq!(error.kind, CallErrorKind::Timeout);
            assert_eq!(error.message, message);
        }
        other => panic!("{other:?}"),
    };
    let mut outbound = Outbound::new(call(1), at_ms(0));
    assert_eq!(outbound.deadline(), at_ms(5000));
    timed_out(outbound.on_time(at_ms(5000)), &format!("resolve {HOST}:443: timed out after 5 s"));

    let mut outbound = Outbound::new(call(1), at_ms(0));
    outbound.on_resolved(&Ok(vec![address(1)]), at_ms(0));
    timed_out(outbound.on_time(at_ms(2003)), &format!("connect {HOST}:443: timed out after 2 s"));

    let mut line = Line::new(&client, &server, REPLY, UNCUT);
    assert_eq!(line.outbound.deadline(), at_ms(3000));
    let step = line.outbound.on_time(at_ms(3000));
    timed_out(step, &format!("TLS handshake with {HOST}:443: timed out after 3 s"));

    let mut line = Line::new(&client, &server, b"", UNCUT);
    line.now = at_ms(1000);
    assert!(matches!(line.run(), Outcome::Waits));
    assert_eq!(line.outbound.deadline(), at_ms(6000));
    timed_out(line.outbound.on_time(at_ms(6000)), &format!("reply of {HOST}:443: timed out after 5 s"));

    let mut line = Line::new(&client, &server, REPLY, UNCUT);
    assert_replied(line.run(), 1, false);
    assert_eq!(line.outbound.deadline(), at_ms(60_000));
    assert!(matches!(line.outbound.on_time(at_ms(60_000)), Step::Closed));
    line.outbound.say_goodbye();
    let goodbye = line.outbound.pending().to_vec();
    line.peer.on_bytes(&goodbye).unwrap();
    assert!(line.peer.client_has_closed, "it ends as TLS wants it");

    // A call that is given up earlier cuts its stages.
    let outbound = Outbound::new(Call { deadline: at_ms(300), ..call(1) }, at_ms(0));
    assert_eq!(outbound.deadline(), at_ms(300));
}

#[test]
fn the_metadata_service_is_spoken_to_in_the_clear() {
    let plain = || {
        let mut outbound = Outbound::new(Call { service: Service::Metadata, ..call(1) }, at_ms(0));
        outbound.on_resolved(&Ok(vec![address(1)]), at_ms(0));
        assert!(matches!(outbound.on_connected(None, at_ms(0)), Step::SendRequest));
        outbound.send(REQUEST);
        assert_eq!(outbound.pending(), REQUEST);
        outbound.on_sent(10);
        assert_eq!(outbound.pending(), &REQUEST[10..], "a short write");
        outbound
    };
    let mut outbound = plain();
    outbound.on_sent(REQUEST.len() - 10);
    for byte in &REPLY[..REPLY.len() - 1] {
        assert!(matches!(outbound.on_bytes(&[*byte], at_ms(1)), Step::Wait));
    }
    let step = outbound.on_bytes(&REPLY[REPLY.len() - 1..], at_ms(1));
    assert!(matches!(step, Step::Replied { close: false, .. }), "{step:?}");
    assert!(!outbound.is_idle_for(&call(2)), "KMS is somebody else");
    assert!(outbound.is_idle_for(&Call { service: Service::Metadata, ..call(2) }));
    // A reply before the whole request was taken: the connection is of no more use.
    let step = plain().on_bytes(REPLY, at_ms(1));
    assert!(matches!(step, Step::Replied { close: true, .. }), "{step:?}");
    // In the clear TCP's end is all there is.
    let mut outbound = plain();
    outbound.on_bytes(b"HTTP/1.1 200 OK\r\n\r\nrole", at_ms(1));
    let Step::Replied { response, close: true, .. } = outbound.on_end(None, at_ms(2)) else { panic!() };
    assert_eq!(*response.body, b"role");
}

// ---- What the binary trusts ----

#[test]
fn a_certificate_that_does_not_verify_stops_everything() {
    for (certificate, words) in [
        (BadCertificate::OtherCa, "certificate"),
        (BadCertificate::SelfSigned, "certificate"),
        (BadCertificate::WrongName, "not valid for"),
        (BadCertificate::Expired, "expired"),
    ] {
        let emulator = emulator(&[("a", "1")]);
        emulator.set_kms_mode(KmsMode::Certificate(certificate)).unwrap();
        let agent = Agent::start(&emulator);
        let reply = agent.secret("a");
        assert_eq!(reply.verdict(), "502 UpstreamUnreachable", "{certificate:?}");
        let message = reply.field("Message");
        let address = emulator.kms_addr().to_string();
        for part in [words, "the server's certificate does not verify", &address] {
            assert!(message.contains(part), "{certificate:?}: {message}");
        }
        let counters = emulator.counters();
        assert_eq!((counters.kms_requests, counters.tls_handshakes), (0, 0), "{certificate:?}: nothing sent");
        assert!(counters.tls_failed > 0);
        emulator.set_kms_mode(KmsMode::Normal).unwrap();
        assert_eq!(agent.secret("a").verdict(), "200 MISS", "{certificate:?}: it heals");
    }
}

#[test]
fn without_the_ca_file_nothing_private_is_trusted_and_sighup_reads_a_new_one() {
    let emulator = emulator(&[("a", "1")]);
    let other = common::emulator(&[]);
    let setup = Setup::new(&emulator);
    let ca_file = setup.folder.write("ca.pem", other.ca_pem());
    let agent = setup.start();
    assert_eq!(agent.secret("a").verdict(), "502 UpstreamUnreachable");
    // A broken file changes nothing, and says so.
    fs::write(&ca_file, "no certificate\n").unwrap();
    agent.signal(Signal::HUP);
    agent.wait_for_log("the certificates that were trusted before stay trusted");
    assert_eq!(agent.secret("a").verdict(), "502 UpstreamUnreachable");
    assert_eq!(emulator.counters().kms_requests, 0);
    fs::write(&ca_file, emulator.ca_pem()).unwrap();
    agent.signal(Signal::HUP);
    wait_until("the new CA is trusted", || agent.secret("a").status == 200);

    let agent = Setup::new(&emulator).without("KMS", "CaFile").start();
    let reply = agent.secret("a");
    assert_eq!(reply.verdict(), "502 UpstreamUnreachable");
    assert!(reply.field("Message").contains("CaFile"), "says what to set: {}", reply.text());
}
