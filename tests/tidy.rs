//! The house rules that no compiler knows: imports point one way, one file reads the clock, one file knows
//! mio, one file ends the process.
//!
//! It reads the sources' tokens, comments, strings and `#[cfg(test)]` items left out. Each rule is tested on
//! sources that break it, below.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The single list of the house's floors, lowest first: a module may import from its own floor and those
/// below. The table in `src/lib.rs` has to say the same.
const FLOORS: &[&[&str]] = &[
    &["time", "secret", "wipe", "buf", "text", "json", "log", "random"],
    &["config", "http", "call", "code", "metrics"],
    &["kms", "identity", "cache", "token"],
    &["conn"],
    &["broker"],
    &["net", "harden"],
    &["server"],
    &["cli"],
];

/// Imports that the floors would allow and that must not be: who, whom, why.
const FORBIDDEN_IMPORTS: &[(&str, &str, &str)] = &[(
    "broker",
    "conn",
    "the broker says what is wanted, as a call::Call; the server puts it on a connection",
)];

/// Words that only some files may use.
struct Rule {
    /// Token sequences; each one is a breach.
    words: &'static [&'static [&'static str]],
    /// Files or folders (with a `/` at the end) below `src/` that may, each with its reason.
    allowed: &'static [(&'static str, &'static str)],
    /// What to do instead.
    advice: &'static str,
}

const RULES: &[Rule] = &[
    Rule {
        words: &[
            &["Instant", "::", "now"],
            &["SystemTime", "::", "now"],
            &["OffsetDateTime", "::", "now_utc"],
            &["OffsetDateTime", "::", "now_local"],
            &["UtcDateTime", "::", "now"],
            &[".", "elapsed"],
            &["clock_gettime"],
        ],
        allowed: &[("time.rs", "the only file that reads a clock")],
        advice: "take a time::Now (or its mono) as a parameter, so that tests and the simulation own the time",
    },
    Rule {
        words: &[&["Clock", "::", "start"]],
        allowed: &[
            ("time.rs", "defines it"),
            ("net/mio.rs", "gives the loop its time"),
            ("log/", "retries writing, and puts the time on each line"),
            ("cli/local.rs", "commands other than run have no loop that could hand them the time"),
            ("cli/probe.rs", "likewise"),
        ],
        advice: "only the bottom of the house has a Clock: take a time::Now as a parameter",
    },
    Rule {
        words: &[&["mio", "::"], &["use", "mio", ";"], &["use", "mio", "as"], &["extern", "crate", "mio"]],
        allowed: &[("net/mio.rs", "the only user of mio")],
        advice: "say it through trait net::Net, and let net/mio.rs do it",
    },
    Rule {
        words: &[&["process", "::", "exit"], &["ExitCode"], &["process", "::", "abort"]],
        allowed: &[("main.rs", "the only end of the process")],
        advice: "return a u8 to cli::main, and let main.rs end the process",
    },
    Rule {
        words: &[&["todo", "!"], &["unimplemented", "!"], &["dbg", "!"]],
        allowed: &[],
        advice: "finish it, or return an error that says so",
    },
];

#[test]
fn the_house_is_tidy() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&src, "", &mut files);
    assert!(files.len() > 20, "the sources are here");
    let problems = problems(&files);
    assert!(problems.is_empty(), "{} problems:\n{}\n", problems.len(), problems.join("\n"));
}

fn collect(folder: &Path, prefix: &str, files: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            collect(&entry.path(), &format!("{name}/"), files);
        } else if name.ends_with(".rs") {
            files.push((name, fs::read_to_string(entry.path()).unwrap()));
        }
    }
    files.sort();
}

/// Everything that is wrong with these files, named by their path below `src/`.
fn problems(files: &[(String, String)]) -> Vec<String> {
    let mut sources = Vec::new();
    let mut tests = BTreeSet::new();
    for (path, text) in files {
        let (tokens, test_modules) = without_tests(tokens(text));
        let folder = module_path(path).join("/");
        for name in test_modules {
            let stem = if folder.is_empty() { name } else { format!("{folder}/{name}") };
            tests.extend([format!("{stem}.rs"), format!("{stem}/mod.rs")]);
        }
        sources.push((path.as_str(), tokens));
    }
    sources.retain(|(path, _)| !tests.contains(*path));

    let mut problems = Vec::new();
    check_modules(&sources, &mut problems);
    for (path, text) in files {
        if path == "lib.rs" {
            check_map(text, &mut problems);
        }
    }
    for (path, tokens) in &sources {
        check_imports(path, tokens, &mut problems);
        check_rules(path, tokens, &mut problems);
    }
    problems
}

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&module))
}

/// Each module has a floor, each name on a floor is a module.
fn check_modules(sources: &[(&str, Vec<Token>)], problems: &mut Vec<String>) {
    let modules: BTreeSet<&str> = sources
        .iter()
        .map(|(path, _)| path.split(['/', '.']).next().unwrap())
        .filter(|name| !["lib", "main"].contains(name))
        .collect();
    for module in &modules {
        if floor(module).is_none() {
            problems.push(format!(
                "src/{module}: on no floor. Put it into FLOORS in tests/tidy.rs (just above what it imports) and \
                 into the table in src/lib.rs"
            ));
        }
    }
    for module in FLOORS.iter().flat_map(|floor| floor.iter()) {
        if !modules.contains(module) {
            problems
                .push(format!("FLOORS in tests/tidy.rs names {module}, which is not in src/: take it out"));
        }
    }
}

/// The table of `lib.rs`, rows `//! | floor | [`module`] ..`, says what [`FLOORS`] says.
fn check_map(lib: &str, problems: &mut Vec<String>) {
    let mut rows = Vec::new();
    for line in lib.lines() {
        let cells: Vec<&str> = line.strip_prefix("//! |").unwrap_or_default().split('|').collect();
        let [number, modules, ..] = cells[..] else { continue };
        if number.trim().parse() == Ok(rows.len() + 1) {
            let names = modules.split(['[', ']', '`', ' ']).filter(|name| !name.is_empty());
            rows.push(names.map(str::to_owned).collect::<BTreeSet<String>>());
        }
    }
    for number in 0..rows.len().max(FLOORS.len()) {
        let ours: BTreeSet<String> = FLOORS
            .get(number)
            .into_iter()
            .flat_map(|floor| floor.iter())
            .map(|it| (*it).to_owned())
            .collect();
        let theirs = rows.get(number).cloned().unwrap_or_default();
        if ours != theirs {
            problems.push(format!(
                "src/lib.rs: floor {} of its table is {theirs:?}, FLOORS in tests/tidy.rs has {ours:?}: make them \
                 the same",
                number + 1
            ));
        }
    }
}

fn check_imports(path: &str, tokens: &[Token], problems: &mut Vec<String>) {
    let own = module_path(path);
    let mut imports = Vec::new();
    for at in 0..tokens.len() {
        match tokens[at].text.as_str() {
            "crate" => heads(tokens, at + 1, &mut imports),
            "super" if at < 2 || tokens[at - 2].text != "super" => {
                let mut end = at + 1;
                let mut levels = 1;
                while text(tokens, end) == "::" && text(tokens, end + 1) == "super" {
                    levels += 1;
                    end += 2;
                }
                if levels >= own.len() {
                    heads(tokens, end, &mut imports);
                }
            }
            "mod" if text(tokens, at + 2) == "{" => problems.push(format!(
                "src/{path}:{}: an inline module; `super` in it means something else than this test thinks. Give \
                 it a file",
                tokens[at].line
            )),
            _ => {}
        }
    }
    let Some(from) = own.first() else { return };
    for (module, line) in imports {
        let (Some(own_floor), Some(floor)) = (floor(from), floor(&module)) else { continue };
        if floor > own_floor {
            problems.push(format!(
                "src/{path}:{line}: {from} (floor {}) imports {module} (floor {}): imports point down only. Move \
                 what it needs below both, or hand it in from above",
                own_floor + 1,
                floor + 1
            ));
        }
        for (_, _, why) in FORBIDDEN_IMPORTS.iter().filter(|(who, whom, _)| who == from && *whom == module) {
            problems.push(format!("src/{path}:{line}: {from} must not import {module}: {why}"));
        }
    }
}

/// The first names after `crate` or `super`: of `::a::b` a, of `::{a::b, c}` a and c. `at`: the `::`.
fn heads(tokens: &[Token], at: usize, out: &mut Vec<(String, usize)>) {
    if text(tokens, at) != "::" {
        return;
    }
    if text(tokens, at + 1) != "{" {
        out.extend(tokens.get(at + 1).map(|token| (token.text.clone(), token.line)));
        return;
    }
    let mut depth = 0;
    for index in at + 1..tokens.len() {
        let before = text(tokens, index - 1);
        match text(tokens, index) {
            "{" => depth += 1,
            "}" => depth -= 1,
            name if depth == 1 && ["{", ","].contains(&before) => {
                out.push((name.to_owned(), tokens[index].line));
            }
            _ => {}
        }
        if depth == 0 {
            return;
        }
    }
}

fn check_rules(path: &str, tokens: &[Token], problems: &mut Vec<String>) {
    for rule in RULES {
        let is_allowed =
            |(place, _): &(&str, &str)| path == *place || place.ends_with('/') && path.starts_with(*place);
        if rule.allowed.iter().any(is_allowed) {
            continue;
        }
        for (at, token) in tokens.iter().enumerate() {
            // `net::mio::MioNet` is our module, not the crate.
            let is_inner = token.text == "mio"
                && at > 1
                && tokens[at - 1].text == "::"
                && tokens[at - 2].text != "use"
                && tokens[at - 2].text.chars().all(|c| c.is_alphanumeric() || c == '_');
            for words in rule.words {
                let found = words.iter().enumerate().all(|(n, word)| text(tokens, at + n) == *word);
                if found && !is_inner {
                    let allowed: Vec<String> =
                        rule.allowed.iter().map(|(place, why)| format!("src/{place} ({why})")).collect();
                    let allowed = if allowed.is_empty() {
                        "nowhere".to_owned()
                    } else {
                        format!("only in {}", allowed.join(", "))
                    };
                    problems.push(format!(
                        "src/{path}:{}: {}: {allowed}; {}",
                        token.line,
                        words.concat(),
                        rule.advice
                    ));
                }
            }
        }
    }
}

/// `broker/gate.rs` is `[broker, gate]`, `broker/mod.rs` is `[broker]`, `lib.rs` and `main.rs` are the root.
fn module_path(path: &str) -> Vec<String> {
    let parts = path.strip_suffix(".rs").unwrap_or(path).split('/');
    parts.filter(|part| !["mod", "lib", "main"].contains(part)).map(str::to_owned).collect()
}

// ---- Tokens ----

/// A word, a number, `::`, or one character of punctuation.
#[derive(Clone, Debug)]
struct Token {
    text: String,
    line: usize,
}

fn text(tokens: &[Token], at: usize) -> &str {
    tokens.get(at).map_or("", |token| &token.text)
}

/// The tokens of a source; comments are left out, and of strings and characters only `""` stays.
fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let peek = |at: usize| chars.get(at).copied().unwrap_or('\0');
    let (mut out, mut at, mut line) = (Vec::new(), 0, 1);
    while at < chars.len() {
        let (start, start_line) = (at, line);
        let mut text = None;
        match (chars[at], peek(at + 1)) {
            ('/', '/') => at = (at..chars.len()).find(|i| chars[*i] == '\n').unwrap_or(chars.len()),
            ('/', '*') => {
                let mut depth = 0;
                while at < chars.len() {
                    match (chars[at], peek(at + 1)) {
                        ('/', '*') => (depth, at) = (depth + 1, at + 2),
                        ('*', '/') => (depth, at) = (depth - 1, at + 2),
                        _ => at += 1,
                    }
                    if depth == 0 {
                        break;
                    }
                }
            }
            ('"', _) => {
                at = end_of_quoted(&chars, at, '"');
                text = Some("\"\"".to_owned());
            }
            ('\'', '\\') => at = end_of_quoted(&chars, at, '\''),
            // A character, and not the tick of a lifetime or label.
            ('\'', _) if peek(at + 2) == '\'' => at += 3,
            ('\'', _) => at += 1,
            (':', ':') => {
                at += 2;
                text = Some("::".to_owned());
            }
            (c, _) if is_word(c) => {
                at = (at..chars.len()).find(|i| !is_word(chars[*i])).unwrap_or(chars.len());
                let word: String = chars[start..at].iter().collect();
                let hashes = (at..).take_while(|i| peek(*i) == '#').count();
                if ["r", "br", "cr"].contains(&word.as_str()) && peek(at + hashes) == '"' {
                    let end: Vec<char> = std::iter::once('"').chain(vec!['#'; hashes]).collect();
                    let from = at + hashes + 1;
                    let found = chars[from..].windows(end.len()).position(|it| it == end.as_slice());
                    at = found.map_or(chars.len(), |found| from + found + end.len());
                    text = Some("\"\"".to_owned());
                } else if !(["b", "c"].contains(&word.as_str()) && peek(at) == '"') {
                    text = Some(word);
                }
            }
            (c, _) => {
                at += 1;
                text = (!c.is_whitespace()).then(|| c.to_string());
            }
        }
        line += chars[start..at].iter().filter(|c| **c == '\n').count();
        out.extend(text.map(|text| Token { text, line: start_line }));
    }
    out
}

fn end_of_quoted(chars: &[char], start: usize, quote: char) -> usize {
    let mut at = start + 1;
    while at < chars.len() && chars[at] != quote {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(chars.len())
}

/// Leaves out items under `#[cfg(test)]`; gives the names of such modules that are files of their own.
fn without_tests(tokens: Vec<Token>) -> (Vec<Token>, Vec<String>) {
    const MARK: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let (mut kept, mut modules, mut at) = (Vec::new(), Vec::new(), 0);
    while at < tokens.len() {
        if !(0..MARK.len()).all(|n| text(&tokens, at + n) == MARK[n]) {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        at += MARK.len();
        let start = at;
        let mut depth = 0_i32;
        // To the item's end: its `;`, or the end of its braces.
        while at < tokens.len() {
            match text(&tokens, at) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth -= 1,
                _ => {}
            }
            at += 1;
            if depth == 0 && [";", "}"].contains(&text(&tokens, at - 1)) {
                break;
            }
        }
        let item = &tokens[start..at];
        if let Some(name) = item.iter().position(|token| token.text == "mod").map(|n| text(item, n + 1))
            && item.last().is_some_and(|token| token.text == ";")
        {
            modules.push(name.to_owned());
        }
    }
    (kept, modules)
}

// ---- The rules themselves ----

/// The problems of one file in an otherwise empty house.
fn problems_of(path: &str, source: &str) -> Vec<String> {
    let mut problems = problems(&[(path.to_owned(), source.to_owned())]);
    problems.retain(|problem| !problem.starts_with("FLOORS "));
    problems
}

#[test]
fn imports_that_point_up_are_found_however_they_are_written() {
    for (path, source) in [
        ("cache/mod.rs", "use crate::broker::Broker;"),
        ("cache/mod.rs", "use crate::{buf::Buf, broker::{self, gate}};"),
        ("cache/mod.rs", "fn f() { crate::broker::ask() }"),
        ("cache/mod.rs", "use super::broker;"),
        ("cache/lru.rs", "use super::super::{http, broker};"),
        ("http/body.rs", "pub(crate) type A<'a> = &'a crate::cache::Key;"),
        ("time.rs", "use crate::config::Config;"),
        ("net/mod.rs", "use crate::server::Server;"),
        ("broker/mod.rs", "use crate::conn::tls;"),
        ("broker/gate.rs", "#[cfg(any(test, fuzzing))]\nuse crate::conn::tls;"),
    ] {
        let found = problems_of(path, source);
        assert_eq!(found.len(), 1, "{path}: {source}: {found:?}");
        assert!(found[0].starts_with(&format!("src/{path}:{}: ", source.lines().count())), "{found:?}");
    }
}

#[test]
fn words_out_of_their_place_are_found() {
    for (path, source) in [
        ("cache/mod.rs", "let t = std::time::Instant::now();"),
        ("cache/mod.rs", "let t = SystemTime::now();"),
        ("cache/mod.rs", "if since.elapsed() > x {}"),
        ("server/mod.rs", "let clock = crate::time::Clock::start();"),
        ("server/mod.rs", "use mio::Poll;"),
        ("server/mod.rs", "use mio;"),
        ("server/mod.rs", "use ::mio::Poll;"),
        ("server/mod.rs", "fn f(p: &::mio::Poll) {}"),
        ("cli/run.rs", "std::process::exit(1);"),
        ("cli/run.rs", "fn main() -> ExitCode {}"),
        ("http/mod.rs", "todo!()"),
        ("http/mod.rs", "let x = dbg!(y);"),
        ("http/mod.rs", "unimplemented!(\"later\")"),
        ("http/mod.rs", "mod inner { fn f() {} }"),
        ("attic.rs", ""),
    ] {
        let found = problems_of(path, source);
        assert_eq!(found.len(), 1, "{path}: {source}: {found:?}");
    }
}

#[test]
fn what_is_allowed_is_let_through() {
    for (path, source) in [
        ("time.rs", "pub fn now() -> Instant { Instant::now() }"),
        ("net/mio.rs", "use mio::Poll; use crate::time::Clock; use super::{Net, Token};"),
        ("cli/run.rs", "use crate::net::mio::{MioNet, listen};"),
        ("main.rs", "fn main() -> ExitCode { ExitCode::from(kms_agent::cli::main()) }"),
        ("broker/flight.rs", "use super::answer::Failure; use crate::cache::Key; pub(super) struct A;"),
        ("cache/lru.rs", "use super::Key; use crate::{buf, http::percent};"),
        (
            "cache/mod.rs",
            "// crate::broker, dbg!\n/* todo!() /* Instant::now() */ */ /// [`crate::server`]\n",
        ),
        (
            "cache/mod.rs",
            r##"const A: &str = "crate::broker::B \" todo!()"; const B: &str = r#"todo!() ""#;"##,
        ),
        ("cache/mod.rs", r#"const A: &[u8] = b"todo!()"; const B: char = '"'; fn f<'a>() { dbg("'") } // "#),
        (
            "cache/mod.rs",
            "#[cfg(test)]\n#[allow(x)]\nmod tests { use crate::broker::B; fn f() { dbg!(1) } }\nfn g() {}",
        ),
        ("cache/mod.rs", "#[cfg(test)]\nuse crate::broker::B;\nfn g() {}"),
    ] {
        let found = problems_of(path, source);
        assert!(found.is_empty(), "{path}: {source}: {found:?}");
    }
    // What follows a test item is looked at again.
    assert_eq!(
        problems_of("cache/mod.rs", "#[cfg(test)]\nmod tests { fn f() {} }\nfn g() { dbg!(1) }").len(),
        1
    );
    // A test module in a file of its own is a test.
    let files = [("broker/mod.rs", "#[cfg(test)]\nmod tests;"), ("broker/tests.rs", "use crate::server::S;")];
    let found = problems(&files.map(|(path, source)| (path.to_owned(), source.to_owned())));
    assert!(!found.iter().any(|problem| problem.contains("broker")), "{found:?}");
}

#[test]
fn the_map_must_say_what_the_floors_say() {
    let map = |floors: &[&[&str]]| {
        let row = |(n, floor): (usize, &&[&str])| {
            let names: Vec<String> = floor.iter().map(|name| format!("[`{name}`]")).collect();
            format!("//! | {} | {} | words |\n", n + 1, names.join(" "))
        };
        format!(
            "//! | Floor | Modules | |\n//! |---|---|---|\n{}",
            floors.iter().enumerate().map(row).collect::<String>()
        )
    };
    assert!(problems_of("lib.rs", &map(FLOORS)).is_empty());
    assert_eq!(problems_of("lib.rs", &map(&FLOORS[..7])).len(), 1);
    let mut swapped = FLOORS.to_vec();
    swapped.swap(3, 4);
    assert_eq!(problems_of("lib.rs", &map(&swapped)).len(), 2);
}
