//! Everything that can go wrong, as a client sees it.

#![allow(clippy::expect_used, reason = "helpers of tests are tests")]

mod support;

use kms_emulator::{
    BadCertificate, Emulator, Fault, FaultKind, Framing, KmsMode, NewSecret, Options, RawReply,
    StsCredentials,
};
use std::io::{self, ErrorKind, Read, Write};
use std::time::{Duration, Instant};
use support::{Call, Tls, connect, read_reply, tls_config};

fn start() -> (Emulator, StsCredentials) {
    let secrets = vec![NewSecret::generic("a", "first"), NewSecret::generic("b", "second")];
    let emulator = Emulator::start(Options { secrets, ..Options::default() }).expect("it starts");
    let who = emulator.issue_credentials();
    (emulator, who)
}

fn ask(tls: &mut Tls, who: &StsCredentials, name: &str) {
    tls.write_all(&Call::get(who, name).bytes()).expect("sent");
}

/// All bytes up to the end of the connection, and how it ended.
fn read_to_end(tls: &mut Tls) -> (String, Option<ErrorKind>) {
    let mut bytes = Vec::new();
    let end = tls.read_to_end(&mut bytes).err().map(|e| e.kind());
    (String::from_utf8_lossy(&bytes).into_owned(), end)
}

/// The connection ends without a byte. Whether the kernel makes an end or a reset of that depends on whether all that
/// the client had sent was read by then.
#[track_caller]
fn assert_ends_without_a_byte(tls: &mut Tls) {
    let (text, end) = read_to_end(tls);
    let end = end.expect("TLS would say goodbye");
    assert!(
        text.is_empty() && [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset].contains(&end),
        "{text}{end}"
    );
}

/// Injects a fault for the next request, makes it, and gives what came back until the end.
fn suffer(kind: FaultKind) -> (String, Option<ErrorKind>) {
    let (emulator, who) = start();
    let name = kind.name();
    let id = emulator.inject(Fault::new(kind).for_secret("a").times(1));
    let mut tls = connect(&emulator, &tls_config(&emulator)).expect("connects");
    ask(&mut tls, &who, "a");
    let seen = read_to_end(&mut tls);
    assert_eq!((emulator.counters().fault(name), emulator.fault_hits(id)), (1, 1));
    // Only that secret, only once.
    assert_eq!(Call::get(&who, "a").send(&emulator).expect("a reply").status, 200);
    seen
}

#[test]
fn connections_break_before_amid_and_after_the_reply() {
    assert_eq!(suffer(FaultKind::DropBefore), (String::new(), Some(ErrorKind::UnexpectedEof)));
    assert_eq!(suffer(FaultKind::Reset), (String::new(), Some(ErrorKind::ConnectionReset)));
    assert_eq!(suffer(FaultKind::HalfRecord), (String::new(), Some(ErrorKind::UnexpectedEof)));

    let (amid, end) = suffer(FaultKind::DropAmid);
    let (head, body) = amid.split_once("\r\n\r\n").expect("a head");
    let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")).expect("a length");
    assert_eq!(
        (body.len(), end),
        (length.parse::<usize>().expect("a number") / 2, Some(ErrorKind::UnexpectedEof))
    );

    let (after, end) = suffer(FaultKind::DropAfter);
    assert!(after.starts_with("HTTP/1.1 200 OK\r\n") && after.ends_with('}'), "{after}");
    assert!(!after.contains("connection: close") && end == Some(ErrorKind::UnexpectedEof));

    let (bytes, end) = suffer(FaultKind::Bytes(b"SSH-2.0-nope\r\n".to_vec()));
    assert_eq!((bytes.as_str(), end), ("SSH-2.0-nope\r\n", None));
}

#[test]
fn replies_in_other_framing_are_the_genuine_ones() {
    let (emulator, who) = start();
    let mut tls = connect(&emulator, &tls_config(&emulator)).expect("connects");
    emulator.inject(Fault::framed(Framing::Chunked(7)).times(1));
    ask(&mut tls, &who, "a");
    let mut chunked = String::new();
    while !chunked.ends_with("\r\n0\r\n\r\n") {
        let mut byte = [0];
        tls.read_exact(&mut byte).expect("more");
        chunked.push(char::from(byte[0]));
    }
    assert!(
        chunked.contains("\r\ntransfer-encoding: chunked\r\n")
            && chunked.contains("\r\n\r\n7\r\n{\"Secre\r\n")
    );

    // The connection goes on; now with interim responses in front.
    emulator.inject(
        Fault::new(FaultKind::Reply(RawReply { interim: vec![103], ..RawReply::default() })).times(1),
    );
    ask(&mut tls, &who, "b");
    assert!(read_reply(&mut tls).expect("interim").head.starts_with("http/1.1 103 "));
    assert_eq!(read_reply(&mut tls).expect("final").json()["SecretData"], "second");

    emulator.inject(Fault::framed(Framing::UntilClose).times(1));
    ask(&mut tls, &who, "a");
    let (text, end) = read_to_end(&mut tls);
    assert!(!text.contains("content-length") && text.ends_with('}') && end.is_none(), "{text}");

    emulator.inject(Fault::framed(Framing::FalseLength(1 << 20)).times(1));
    assert_eq!(Call::get(&who, "a").send(&emulator).err().map(|e| e.kind()), Some(ErrorKind::UnexpectedEof));
    assert_eq!(emulator.counters().kms_accepted, 2);
}

#[test]
fn lies_errors_and_delays_by_secret() {
    let (emulator, who) = start();
    emulator.raw_reply("a", 200, "not JSON");
    assert_eq!(Call::get(&who, "a").send(&emulator).expect("a reply").body, "not JSON");
    assert_eq!(Call::get(&who, "b").send(&emulator).expect("a reply").status, 200);
    emulator.clear_faults_for("a");

    let error =
        Fault::error(503, "ServiceUnavailableTemporary").with_header("Retry-After", "2").for_secret("a");
    let id = emulator.inject(error);
    let reply = Call::get(&who, &emulator.arn("a")).send(&emulator).expect("a reply");
    assert_eq!((reply.status, reply.code().as_str()), (503, "ServiceUnavailableTemporary"));
    assert!(reply.head.contains("\r\nretry-after: 2\r\n"));
    emulator.clear_fault(id);

    let pause = Duration::from_millis(300);
    emulator.delay_secret("a", pause);
    let began = Instant::now();
    assert_eq!(Call::get(&who, "a").send(&emulator).expect("a reply").status, 200);
    assert!(began.elapsed() >= pause);
    let log = emulator.requests();
    let slow = log.last().expect("a request");
    assert!(slow.answered.expect("answered") - slow.arrived >= pause);
}

#[test]
fn a_stalled_request_holds_up_nobody_else() {
    let (emulator, who) = start();
    emulator.inject(Fault::new(FaultKind::Stall).for_secret("a"));
    let mut stalled = connect(&emulator, &tls_config(&emulator)).expect("connects");
    ask(&mut stalled, &who, "a");
    assert!(emulator.wait_for(Duration::from_secs(60), |c| c.fault("stall") == 1));
    assert_eq!(Call::get(&who, "b").send(&emulator).expect("a reply").status, 200);
    stalled.sock.set_nonblocking(true).expect("set");
    let mut byte = [0];
    assert_eq!(stalled.read(&mut byte).err().map(|e| e.kind()), Some(ErrorKind::WouldBlock));
    // The client gives up, and the emulator notices.
    drop(stalled);
    assert!(emulator.wait_for(Duration::from_secs(60), |c| c.kms_open == 0));
    let log = emulator.requests();
    assert_eq!((log[0].status, log[0].answered), (None, None));
}

#[test]
fn the_port_can_refuse_close_and_stall() {
    let (emulator, who) = start();
    let config = tls_config(&emulator);
    let kind = |result: io::Result<Tls>| result.err().map(|e| e.kind());
    let mut open = connect(&emulator, &config).expect("connects");

    emulator.set_kms_mode(KmsMode::Refuse).expect("set");
    assert_ends_without_a_byte(&mut open);
    assert_eq!(kind(connect(&emulator, &config)), Some(ErrorKind::ConnectionRefused));
    let port = emulator.kms_port();
    emulator.set_kms_mode(KmsMode::Normal).expect("set");
    assert_eq!(Call::get(&who, "a").send(&emulator).expect("a reply").status, 200);
    assert_eq!(emulator.kms_port(), port);

    emulator.set_kms_mode(KmsMode::Close).expect("set");
    assert!(connect(&emulator, &config).is_err());
    emulator.set_kms_mode_for(KmsMode::Close, 1);
    assert!(connect(&emulator, &config).is_err());
    assert!(connect(&emulator, &config).is_ok());

    emulator.set_kms_mode(KmsMode::StallHandshake).expect("set");
    let accepted = emulator.counters().kms_accepted;
    std::thread::scope(|scope| {
        let stalled = scope.spawn(|| connect(&emulator, &config).map(drop));
        assert!(emulator.wait_for(Duration::from_secs(60), |c| c.kms_accepted == accepted + 1));
        emulator.close_kms_connections();
        assert!(stalled.join().expect("no panic").is_err());
    });

    emulator.set_kms_mode(KmsMode::StallReply).expect("set");
    let mut tls = connect(&emulator, &config).expect("the handshake works");
    let requests = emulator.counters().kms_requests;
    ask(&mut tls, &who, "a");
    assert!(emulator.wait_for(Duration::from_secs(60), |c| c.kms_requests == requests + 1));
    emulator.close_kms_connections();
    assert_ends_without_a_byte(&mut tls);
}

#[test]
fn bad_certificates_are_bad() {
    let (emulator, _) = start();
    let config = tls_config(&emulator);
    let cases = [
        (BadCertificate::OtherCa, "BadSignature"),
        (BadCertificate::SelfSigned, "UnknownIssuer"),
        (BadCertificate::WrongName, "not valid for name"),
        (BadCertificate::Expired, "expired"),
    ];
    for (failed_before, (bad, part)) in (0..).zip(cases) {
        emulator.set_kms_mode(KmsMode::Certificate(bad)).expect("set");
        let message = connect(&emulator, &config).expect_err("refused").to_string();
        assert!(message.contains(part), "{bad:?}: {message}");
        // Before the next mode ends the connection, the emulator has to see the client's alert.
        assert!(emulator.wait_for(Duration::from_secs(60), |c| c.tls_failed == failed_before + 1));
    }
    emulator.set_kms_mode(KmsMode::Normal).expect("set");
    assert!(connect(&emulator, &config).is_ok());
}
