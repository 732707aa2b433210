#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
//! The pure parts, timed one by one: `cargo bench --bench micro`. Times are this machine's; what CI holds is the count
//! of instructions (`benches/hit`).

#[path = "hit/wire.rs"]
mod wire;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use kms_agent::cache::KeyRef;
use kms_agent::cache::lru::Lru;
use kms_agent::config::ResponseType;
use kms_agent::http::request::{Parsed, header_room, parse};
use kms_agent::http::response::ResponseParser;
use kms_agent::kms::sign::Credentials;
use kms_agent::kms::{reply, request};
use std::hint::black_box;
use wire::{Agent, HIT};

/// Seconds since 1970.
const NOW_UNIX_S: i64 = 1_700_000_000;

fn pure_parts(c: &mut Criterion) {
    c.bench_function("parse a request head", |b| {
        b.iter(|| {
            let mut room = header_room();
            let parsed = parse(black_box(HIT.as_bytes()), &mut room);
            assert!(matches!(parsed, Parsed::Request(..)));
        });
    });

    let credentials = Credentials {
        access_key_id: "STS.NUgYrLnoC37mZZCNnAbez".to_owned(),
        access_key_secret: b"key of the bench"[..].into(),
        security_token: Some(vec![b'x'; 600].into()),
        expires_unix_s: None,
    };
    c.bench_function("sign a GetSecretValue request", |b| {
        let mut out = Vec::with_capacity(4096);
        b.iter(|| {
            out.clear();
            let host = "kms-vpc.cn-hangzhou.aliyuncs.com";
            let nonce = b"0123456789abcdef";
            request::get_secret_value(
                &mut out,
                host,
                "db",
                None,
                Some("ACSCurrent"),
                &credentials,
                NOW_UNIX_S,
                nonce,
            )
            .unwrap();
        });
    });

    let body = format!(
        r#"{{"SecretName":"db","VersionId":"v1","SecretData":"{}","SecretDataType":"text","VersionStages":{{"VersionStage":["ACSCurrent"]}},"CreateTime":"2023-07-23T11:56:29Z","NextRotationDate":"2030-07-23T11:56:29Z","RequestId":"6a3e9c36"}}"#,
        "x".repeat(400)
    );
    let bytes = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    c.bench_function("read a reply of KMS's", |b| {
        b.iter(|| {
            let mut parser = ResponseParser::new(128 * 1024);
            parser.feed(black_box(bytes.as_bytes())).unwrap();
            assert!(matches!(reply::parse("db", parser.into_response(), NOW_UNIX_S), reply::Reply::Value(_)));
        });
    });

    c.bench_function("LRU of 1,000: insert one, evict one", |b| {
        let mut lru = Lru::new(1000, usize::MAX);
        for n in 0..1000 {
            lru.insert(KeyRef::current(&format!("secret-{n}")).to_owned(), n, 1);
        }
        let mut n = 1000;
        b.iter_batched(
            || {
                n += 1;
                KeyRef::current(&format!("secret-{n}")).to_owned()
            },
            |key| assert!(lru.insert(key, 0, 1)),
            BatchSize::SmallInput,
        );
    });
}

fn hits(c: &mut Criterion) {
    let mut group = c.benchmark_group("a tick of 50 hits, from read to write");
    group.throughput(Throughput::Elements(50));
    for (name, response_type) in
        [("KMS", ResponseType::Kms), ("AWS", ResponseType::Aws), ("Vault", ResponseType::Vault)]
    {
        let mut agent = Agent::start(response_type, None);
        group.bench_function(name, |b| b.iter(|| agent.serve(1)));
    }
}

criterion_group!(benches, pure_parts, hits);
criterion_main!(benches);
