//! RSA-2048 key pairs for ECS secrets, over plain big integers. The `rsa` crate would bring twenty more
//! crates and an open advisory (RUSTSEC-2023-0071) into the lock file for this one purpose. Not constant in
//! time, which is fine for keys that open nothing.

use crate::random;
use base64::{Engine, engine::general_purpose::STANDARD};
use num_bigint::{BigInt, BigUint};

const MODULUS_BITS: u64 = 2048;
/// Rounds of Miller-Rabin: an error chance below 2^-80 even for adversarial input.
const ROUNDS: usize = 40;

/// A key pair in the forms in which an ECS secret holds it.
#[derive(Debug, Clone)]
pub(crate) struct RsaKeyPair {
    /// PKCS#1 in PEM: `-----BEGIN RSA PRIVATE KEY-----`.
    pub(crate) private_pem: String,
    /// `ssh-rsa <base64> <comment>`, a line of an authorized_keys file.
    pub(crate) public_openssh: String,
}

/// Makes a key pair. Takes some 0.2 s with num-bigint optimised, several seconds without.
pub(crate) fn generate() -> RsaKeyPair {
    let e = BigUint::from(65_537_u32);
    let one = BigUint::from(1_u32);
    loop {
        let (p, q) = (prime(MODULUS_BITS / 2), prime(MODULUS_BITS / 2));
        let (p, q) = if p > q { (p, q) } else { (q, p) };
        let n = &p * &q;
        let (p1, q1) = (&p - &one, &q - &one);
        let (Some(d), Some(coefficient)) = (inverse(&e, &(&p1 * &q1)), inverse(&q, &p)) else { continue };
        if n.bits() != MODULUS_BITS || p == q {
            continue;
        }
        let (dp, dq) = (&d % &p1, &d % &q1);
        let zero = BigUint::ZERO;
        let fields: Vec<u8> =
            [&zero, &n, &e, &d, &p, &q, &dp, &dq, &coefficient].into_iter().flat_map(der_integer).collect();
        return RsaKeyPair {
            private_pem: pem("RSA PRIVATE KEY", &der(0x30, &fields)),
            public_openssh: openssh(&e, &n),
        };
    }
}

/// A random prime with its two top bits set, so that the product of two has the full length.
fn prime(bits: u64) -> BigUint {
    let small = small_primes(8_192);
    loop {
        let mut bytes = vec![0; usize::try_from(bits / 8).unwrap_or_default()];
        random::fill(&mut bytes);
        if let Some(last) = bytes.last_mut() {
            *last |= 1;
        }
        let mut candidate = BigUint::from_bytes_be(&bytes);
        candidate.set_bit(bits - 1, true);
        candidate.set_bit(bits - 2, true);
        if small.iter().all(|p| &candidate % *p != BigUint::ZERO) && is_probably_prime(&candidate) {
            return candidate;
        }
    }
}

fn small_primes(below: u32) -> Vec<u32> {
    let mut found: Vec<u32> = Vec::new();
    for n in 3..below {
        if n % 2 == 1 && found.iter().take_while(|p| *p * *p <= n).all(|p| n % p != 0) {
            found.push(n);
        }
    }
    found
}

/// Miller-Rabin with random bases, for odd `n` far above every small prime.
fn is_probably_prime(n: &BigUint) -> bool {
    let one = BigUint::from(1_u32);
    let minus_one = n - &one;
    let twos = minus_one.trailing_zeros().unwrap_or_default();
    let odd = &minus_one >> twos;
    (0..ROUNDS).all(|_| {
        let mut bytes = vec![0; n.to_bytes_be().len()];
        random::fill(&mut bytes);
        let base = BigUint::from_bytes_be(&bytes) % (n - 3_u32) + 2_u32;
        let mut x = base.modpow(&odd, n);
        if x == one || x == minus_one {
            return true;
        }
        for _ in 1..twos {
            x = &x * &x % n;
            if x == minus_one {
                return true;
            }
        }
        false
    })
}

/// The inverse of `a` modulo `m` by Euclid's extended algorithm.
fn inverse(a: &BigUint, m: &BigUint) -> Option<BigUint> {
    let m = BigInt::from(m.clone());
    let (mut r, mut next_r) = (m.clone(), BigInt::from(a.clone()));
    let (mut t, mut next_t) = (BigInt::ZERO, BigInt::from(1));
    while next_r != BigInt::ZERO {
        let quotient = &r / &next_r;
        (r, next_r) = (next_r.clone(), r - &quotient * next_r);
        (t, next_t) = (next_t.clone(), t - quotient * next_t);
    }
    if r != BigInt::from(1) {
        return None;
    }
    ((t % &m + &m) % m).to_biguint()
}

/// Big-endian with a zero in front where the top bit would read as a sign (DER and SSH agree on that).
fn signed_bytes(n: &BigUint) -> Vec<u8> {
    let mut bytes = n.to_bytes_be();
    if bytes.first().is_some_and(|b| b & 0x80 != 0) {
        bytes.insert(0, 0);
    }
    bytes
}

fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap_or(u32::MAX).to_be_bytes();
    let mut out = vec![tag];
    match length {
        [0, 0, 0, short] if short < 0x80 => out.push(short),
        [0, 0, 0, one] => out.extend([0x81, one]),
        [0, 0, high, low] => out.extend([0x82, high, low]),
        [a, b, c, d] => out.extend([0x84, a, b, c, d]),
    }
    out.extend(content);
    out
}

fn der_integer(n: &BigUint) -> Vec<u8> {
    der(0x02, &signed_bytes(n))
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut out = format!("-----BEGIN {label}-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(64));
        out.push_str(line);
        out.push('\n');
        rest = tail;
    }
    out + "-----END " + label + "-----\n"
}

/// RFC 4253 6.6: the algorithm, e and n, each with a length of 4 bytes in front.
fn openssh(e: &BigUint, n: &BigUint) -> String {
    let mut blob = Vec::new();
    for part in [b"ssh-rsa".to_vec(), signed_bytes(e), signed_bytes(n)] {
        blob.extend(u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
        blob.extend(part);
    }
    format!("ssh-rsa {} imported-openssh-key", STANDARD.encode(blob))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_library_accepts_the_key_pair() {
        let pair = generate();
        let base64: String = pair.private_pem.lines().filter(|line| !line.starts_with("-----")).collect();
        let der = STANDARD.decode(base64).expect("base64");
        // ring checks every relation between the numbers, and then signs with them.
        let key = ring::rsa::KeyPair::from_der(&der).expect("a consistent RSA key");
        assert_eq!(key.public().modulus_len(), 256);
        let mut signature = [0; 256];
        let random = ring::rand::SystemRandom::new();
        key.sign(&ring::signature::RSA_PKCS1_SHA256, &random, b"text", &mut signature).expect("a signature");

        let public = pair.public_openssh.split(' ').nth(1).expect("base64");
        let public = STANDARD.decode(public).expect("base64");
        let modulus = ring::rsa::PublicKeyComponents::<Vec<u8>>::from(key.public()).n;
        assert!(public.ends_with(&modulus) && public.starts_with(b"\0\0\0\x07ssh-rsa\0\0\0\x03\x01\0\x01"));
    }
}
