//! The house rules that no compiler knows: imports point one way and never in a circle, functions stay short and flat.
//! Who may read a clock, use mio or end the process is in `clippy.toml`.
//!
//! It reads the sources' tokens, comments, strings and `#[cfg(test)]` items left out. Each rule is tested on
//! sources that break it, below.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
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

/// Lines of a function, from `fn` to its last brace.
const FN_LINES_MAX: usize = 70;
/// Braces that are open at a time in a function, its own included.
const FN_BRACES_MAX: usize = 6;

/// Problems that are being worked on, as they begin. What is mended is to be taken out.
const OPEN: &[&str] = &["src/broker/fetch.rs: imports itself ", "src/log/file.rs: imports itself "];

#[test]
fn the_house_is_tidy() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&src, "", &mut files);
    assert!(files.len() > 20, "the sources are here");
    let mut problems = problems(&files);
    for open in OPEN {
        let before = problems.len();
        problems.retain(|problem| !problem.starts_with(open));
        assert!(problems.len() < before, "{open}: is mended, take it out of OPEN");
    }
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

/// A file of the house: its path below `src/`, its module's path, and its tokens.
struct Source<'a> {
    path: &'a str,
    module: Vec<String>,
    tokens: Vec<Token>,
}

/// Everything that is wrong with these files, named by their path below `src/`.
fn problems(files: &[(String, String)]) -> Vec<String> {
    let (mut sources, mut tests) = (Vec::new(), BTreeSet::new());
    for (path, text) in files {
        let (tokens, test_modules) = without_tests(tokens(text));
        let module = module_path(path);
        tests.extend(test_modules.into_iter().map(|name| [module.clone(), vec![name]].concat()));
        sources.push(Source { path, module, tokens });
    }
    sources.retain(|source| !tests.contains(&source.module));

    let mut problems = Vec::new();
    check_modules(&sources, &mut problems);
    for (path, text) in files {
        if path == "lib.rs" {
            check_map(text, &mut problems);
        }
    }
    let modules =
        sources.iter().filter(|it| !it.module.is_empty()).map(|it| (&it.module[..], it.path)).collect();
    let mut edges = Edges::new();
    for source in &sources {
        let imports = imports(source, &modules, &mut problems);
        check_floors(source, &imports, &mut problems);
        check_functions(source, &mut problems);
        for (from, to) in file_edges(source, &imports, &modules) {
            edges.entry(from).or_default().insert(to);
        }
    }
    for file in edges.keys() {
        let circle = way(&edges, file, file, &mut BTreeSet::new()).unwrap_or_default();
        // Told once, from its first file on.
        if circle.iter().min() == Some(file) {
            problems.push(format!(
                "src/{file}: imports itself by way of {}: move what both need below them (methods of a parent's type \
                 belong into the parent's file)",
                circle[1..].join(", ")
            ));
        }
    }
    problems
}

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&module))
}

/// Each module has a floor, each name on a floor is a module.
fn check_modules(sources: &[Source<'_>], problems: &mut Vec<String>) {
    let modules: BTreeSet<_> =
        sources.iter().filter_map(|it| it.module.first().map(String::as_str)).collect();
    let known: BTreeSet<_> = FLOORS.concat().into_iter().collect();
    problems.extend(modules.difference(&known).map(|module| {
        format!("src/{module}: on no floor. Put it just above what it imports, into FLOORS in tests/tidy.rs and into \
                 the table in src/lib.rs")
    }));
    problems.extend(
        known.difference(&modules).map(|it| format!("FLOORS names {it}, which is not in src/: take it out")),
    );
}

/// The table of `lib.rs` says what [`FLOORS`] says.
fn check_map(lib: &str, problems: &mut Vec<String>) {
    for (number, floor) in FLOORS.iter().enumerate() {
        let names: Vec<String> = floor.iter().map(|name| format!("[`{name}`]")).collect();
        let row = format!("//! | {} | {} |", number + 1, names.join(" "));
        if !lib.lines().any(|line| line.starts_with(&row)) {
            problems
                .push(format!("src/lib.rs: its table has no row {row}, as FLOORS in tests/tidy.rs has it"));
        }
    }
}

/// The modules' files, by their paths.
type Modules<'a> = BTreeMap<&'a [String], &'a str>;
/// For each file those that it needs.
type Edges<'a> = BTreeMap<&'a str, BTreeSet<&'a str>>;
/// What is imported, from the crate's root on, and in which line.
type Imports = Vec<(Vec<String>, usize)>;

/// All that a file names of other modules, in `use` or anywhere else, however it is written.
fn imports(source: &Source<'_>, modules: &Modules<'_>, problems: &mut Vec<String>) -> Imports {
    let (tokens, own) = (&source.tokens, &source.module);
    let mut imports = Imports::new();
    for at in 0..tokens.len() {
        let (word, line) = (text(tokens, at), tokens[at].line);
        if word == "mod" && text(tokens, at + 2) == "{" {
            problems.push(format!(
                "src/{}:{line}: an inline module; `super` in it means something else than this test thinks. Give it a \
                 file",
                source.path
            ));
        }
        if text(tokens, at + 1) != "::" || at > 0 && text(tokens, at - 1) == "::" {
            continue;
        }
        let levels = (at..).step_by(2).take_while(|at| text(tokens, *at) == "super").count();
        let child = [&own[..], &[word.to_owned()]].concat();
        let (mut root, rest) = match word {
            "crate" => (vec![], at + 2),
            "self" => (own.clone(), at + 2),
            "super" if levels <= own.len() => (own[..own.len() - levels].to_vec(), at + 2 * levels),
            _ if modules.contains_key(&child[..]) => (child, at + 2),
            _ => continue,
        };
        expand(tokens, rest, &mut root, &mut imports);
    }
    imports
}

/// The paths that begin with `root` and go on at `at`: of `a::{b, c::d}` a::b and a::c::d. Gives where they end.
fn expand(tokens: &[Token], mut at: usize, root: &mut Vec<String>, out: &mut Imports) -> usize {
    let depth = root.len();
    if text(tokens, at) == "{" {
        at += 1;
        while !["}", ""].contains(&text(tokens, at)) {
            at = match text(tokens, at) {
                "," => at + 1,
                "as" => at + 2,
                _ => expand(tokens, at, root, out),
            };
        }
        return at + 1;
    }
    let line = tokens.get(at).map_or(0, |token| token.line);
    root.push(text(tokens, at).to_owned());
    at += 1;
    if text(tokens, at) == "::" && (text(tokens, at + 1) == "{" || is_word(text(tokens, at + 1))) {
        at = expand(tokens, at + 1, root, out);
    } else {
        out.push((root.clone(), line));
    }
    root.truncate(depth);
    at
}

fn is_word(text: &str) -> bool {
    text.starts_with(is_word_char)
}

fn is_word_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn check_floors(source: &Source<'_>, imports: &Imports, problems: &mut Vec<String>) {
    let Some(from) = source.module.first() else { return };
    for (path, line) in imports {
        let module = &path[0];
        let (Some(own_floor), Some(floor)) = (floor(from), floor(module)) else { continue };
        let place = format!("src/{}:{line}", source.path);
        if floor > own_floor {
            problems.push(format!(
                "{place}: {from} (floor {}) imports {module} (floor {}): imports point down only. Move what it needs \
                 below both, or hand it in from above",
                own_floor + 1,
                floor + 1
            ));
        }
        for (_, _, why) in FORBIDDEN_IMPORTS.iter().filter(|(who, whom, _)| who == from && whom == module) {
            problems.push(format!("{place}: {from} must not import {module}: {why}"));
        }
    }
}

/// Which file needs which: by imports, and by `impl` blocks for the type of a parent, which needs its methods.
fn file_edges<'a>(source: &Source<'a>, imports: &Imports, modules: &Modules<'a>) -> Vec<(&'a str, &'a str)> {
    let (own, tokens) = (source.path, &source.tokens);
    let foreign = |path: &[String]| {
        let file = (1..=path.len()).rev().find_map(|end| modules.get(&path[..end]).copied());
        file.filter(|file| *file != own)
    };
    let mut edges: Vec<_> = imports.iter().filter_map(|(path, _)| Some((own, foreign(path)?))).collect();
    // Not the `impl` of a parameter or a result.
    let is_item = |at: usize| at == 0 || ["}", ";", "]"].contains(&text(tokens, at - 1));
    for at in (0..tokens.len()).filter(|at| text(tokens, *at) == "impl" && is_item(*at)) {
        let name = implemented(tokens, at);
        edges.extend(imports.iter().filter_map(|(path, _)| {
            let (last, parent) = path.split_last()?;
            let is_of_parent = last == name && source.module.starts_with(parent);
            Some((foreign(path)?, own)).filter(|_| is_of_parent)
        }));
    }
    edges
}

/// The type that the `impl` at `at` is for: in `impl<N: Net> Show for Server<N>` Server.
fn implemented(tokens: &[Token], at: usize) -> &str {
    let (mut depth, mut name) = (0_i32, "");
    for at in at + 1..tokens.len() {
        match text(tokens, at) {
            "{" | "where" => break,
            "<" => depth += 1,
            ">" if text(tokens, at - 1) != "-" => depth -= 1,
            "for" if depth == 0 => name = "",
            word if depth == 0 && name.is_empty() && is_word(word) => name = word,
            _ => {}
        }
    }
    name
}

/// A way from `at` to `goal`, without the latter.
fn way<'a>(edges: &Edges<'a>, at: &'a str, goal: &str, seen: &mut BTreeSet<&'a str>) -> Option<Vec<&'a str>> {
    edges.get(at)?.iter().find_map(|next| match *next {
        next if next == goal => Some(vec![at]),
        next if seen.insert(next) => Some([vec![at], way(edges, next, goal, seen)?].concat()),
        _ => None,
    })
}

fn check_functions(source: &Source<'_>, problems: &mut Vec<String>) {
    let tokens = &source.tokens;
    for at in (0..tokens.len()).filter(|at| text(tokens, *at) == "fn" && is_word(text(tokens, at + 1))) {
        let (mut braces, mut braces_max, mut brackets) = (0_usize, 0, 0_i32);
        for end in at..tokens.len() {
            match text(tokens, end) {
                "(" | "[" => brackets += 1,
                ")" | "]" => brackets -= 1,
                "{" => braces += 1,
                "}" => braces -= 1,
                // Of a trait, without a body.
                ";" if braces == 0 && brackets == 0 => break,
                _ => continue,
            }
            braces_max = braces_max.max(braces);
            if braces > 0 || text(tokens, end) != "}" {
                continue;
            }
            let lines = tokens[end].line - tokens[at].line + 1;
            if lines > FN_LINES_MAX || braces_max > FN_BRACES_MAX {
                problems.push(format!(
                    "src/{}: fn {} has {lines} lines and nests {braces_max} braces, {FN_LINES_MAX} and {FN_BRACES_MAX} \
                     are the most: take it apart",
                    source.path,
                    text(tokens, at + 1)
                ));
            }
            break;
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
    let (mut out, mut rest, mut line) = (Vec::new(), source, 1);
    while let Some(first) = rest.chars().next() {
        let word = &rest[..rest.find(|c| !is_word_char(c)).unwrap_or(rest.len())];
        let after = &rest[word.len()..];
        let hashes = &after[..after.len() - after.trim_start_matches('#').len()];
        let is_raw = ["r", "br", "cr"].contains(&word) && after[hashes.len()..].starts_with('"');
        let (len, text) = match first {
            _ if rest.starts_with("//") => (rest.find('\n').unwrap_or(rest.len()), ""),
            _ if rest.starts_with("/*") => (rest.find("*/").map_or(rest.len(), |end| end + 2), ""),
            _ if rest.starts_with("::") => (2, "::"),
            _ if is_raw => {
                let (begin, end) = (word.len() + hashes.len() + 1, format!("\"{hashes}"));
                (rest[begin..].find(&end).map_or(rest.len(), |found| begin + found + end.len()), "\"\"")
            }
            _ if ["b", "c"].contains(&word) && after.starts_with('"') => (1, ""),
            _ if !word.is_empty() => (word.len(), word),
            '"' => (quoted(rest, '"'), "\"\""),
            // A character, and not the tick of a lifetime or label.
            '\'' if rest.starts_with("'\\") || rest.chars().nth(2) == Some('\'') => (quoted(rest, '\''), ""),
            _ => (first.len_utf8(), rest[..first.len_utf8()].trim()),
        };
        if !["", "'"].contains(&text) {
            out.push(Token { text: text.to_owned(), line });
        }
        line += rest[..len].matches('\n').count();
        rest = &rest[len..];
    }
    out
}

/// The length of the string or character that `source` begins with.
fn quoted(source: &str, quote: char) -> usize {
    let mut escaped = false;
    let end = source.char_indices().skip(1).find(|(_, c)| {
        let ends = *c == quote && !escaped;
        escaped = *c == '\\' && !escaped;
        ends
    });
    end.map_or(source.len(), |(at, _)| at + 1)
}

/// Leaves out items under `#[cfg(test)]`; gives the names of such modules that are files of their own.
fn without_tests(tokens: Vec<Token>) -> (Vec<Token>, Vec<String>) {
    const MARK: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let (mut kept, mut modules, mut at) = (Vec::new(), Vec::new(), 0);
    while at < tokens.len() {
        if (0..MARK.len()).any(|n| text(&tokens, at + n) != MARK[n]) {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        at += MARK.len();
        let mut depth = 0_i32;
        // To the item's end: its `;`, or the end of its braces.
        loop {
            match text(&tokens, at) {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth -= 1,
                "mod" if depth == 0 && text(&tokens, at + 2) == ";" => {
                    modules.push(tokens[at + 1].text.clone())
                }
                _ => {}
            }
            at += 1;
            if depth == 0 && [";", "}"].contains(&text(&tokens, at - 1)) || at >= tokens.len() {
                break;
            }
        }
    }
    (kept, modules)
}

// ---- The rules themselves ----

/// The problems of these files in an otherwise empty house.
fn problems_in(files: &[(&str, &str)]) -> Vec<String> {
    let files: Vec<_> =
        files.iter().map(|(path, source)| ((*path).to_owned(), (*source).to_owned())).collect();
    let mut problems = problems(&files);
    problems.retain(|problem| !problem.starts_with("FLOORS "));
    problems
}

fn problems_of(path: &str, source: &str) -> Vec<String> {
    problems_in(&[(path, source)])
}

#[test]
fn imports_that_point_up_are_found_however_they_are_written() {
    for (path, source) in [
        ("cache/mod.rs", "use crate::broker::Broker;"),
        ("cache/mod.rs", "use crate::{buf::Buf, broker::{self, gate}};"),
        ("cache/mod.rs", "fn f() { crate::broker::ask() }"),
        ("cache/mod.rs", "use super::broker;"),
        ("cache/lru.rs", "use super::super::{http, broker as b};"),
        ("http/body.rs", "pub(crate) type A<'a> = &'a crate::cache::Key;"),
        ("time.rs", "use crate::config::Config;"),
        ("net/mod.rs", "use crate::server::Server;"),
        ("broker/mod.rs", "use crate::conn::tls;"),
        ("broker/gate.rs", "#[cfg(any(test, fuzzing))]\nuse crate::conn::tls;"),
        ("http/mod.rs", "mod inner { fn f() {} }"),
        ("attic.rs", ""),
    ] {
        let found = problems_of(path, source);
        assert!(!found.is_empty() && found.len() < 3, "{path}: {source}: {found:?}");
        let line = format!("src/{path}:{}: ", source.lines().count());
        assert!(path == "attic.rs" || found.iter().all(|it| it.starts_with(&line)), "{found:?}");
    }
}

#[test]
fn what_is_allowed_is_let_through() {
    for (path, source) in [
        ("cli/run.rs", "use crate::net::mio::{MioNet, listen};"),
        ("main.rs", "fn main() -> ExitCode { ExitCode::from(kms_agent::cli::main()) }"),
        ("broker/flight.rs", "use super::answer::Failure; use crate::cache::Key; pub(super) struct A;"),
        ("cache/lru.rs", "use super::Key; use crate::{buf, http::percent};"),
        ("cache/mod.rs", "// crate::broker\n/* crate::broker */ /// [`crate::server`]\n"),
        (
            "cache/mod.rs",
            r##"const A: &str = "crate::broker::B \" {"; const B: &str = r#"crate::cli "{""#;"##,
        ),
        (
            "cache/mod.rs",
            r#"const A: &[u8] = b"crate::cli"; const B: char = '"'; fn f<'a>() { d("'{") } // "#,
        ),
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
    let source = "#[cfg(test)]\nmod tests { fn f() {} }\nfn g() { crate::broker::ask() }";
    assert_eq!(problems_of("cache/mod.rs", source).len(), 1);
    // A test module in a file of its own is a test.
    let files = [("broker/mod.rs", "#[cfg(test)]\nmod tests;"), ("broker/tests.rs", "use crate::server::S;")];
    assert!(problems_in(&files).is_empty());
}

#[test]
fn circles_between_files_are_found() {
    for (a, b) in [
        ("use super::b::B; pub struct A;", "use super::a::A; pub struct B;"),
        ("fn f() { super::b::g() }", "fn g() { crate::cache::a::f() }"),
        ("use super::{c, b::{self, B}};", "use crate::{buf::Buf, cache::{a::A as Z, c}};"),
    ] {
        let found = problems_in(&[("cache/a.rs", a), ("cache/b.rs", b), ("cache/mod.rs", "mod a; mod b;")]);
        assert_eq!(found.len(), 1, "{a} {b}: {found:?}");
        assert!(found[0].starts_with("src/cache/a.rs: imports itself by way of cache/b.rs"), "{found:?}");
    }
    // Methods of the parent's type are the parent's, whether it names anything of its child or not.
    for (parent, child, is_circle) in [
        ("use child::Child;", "pub(super) struct Child;", false),
        ("use child::Child;", "use super::Put; pub(super) struct Child; impl Put for Child {}", true),
        ("use child::Child;", "fn f(_: &super::Cache) {}", true),
        ("", "use super::Cache; impl<N: Fn(A<B>) -> C> Cache<N> { fn f(&self) {} }", true),
        ("", "use super::{Cache, Put}; impl<N> Put for Cache<N> {}", true),
        ("", "use super::Put; struct Child; impl Put for Child {}", false),
        ("", "use super::Cache; struct Child(Cache); impl Child { fn f(_: impl Fn() -> Cache) {} }", false),
        ("", "use super::Cache; struct Child; impl From<Cache> for Child {}", false),
    ] {
        let parent = format!("mod child; {parent} pub(crate) struct Cache<N>(N); trait Put {{}}");
        let found = problems_in(&[("cache/mod.rs", &parent), ("cache/child.rs", child)]);
        assert_eq!(found.len(), usize::from(is_circle), "{child}: {found:?}");
    }
}

#[test]
fn long_and_deep_functions_are_found() {
    for (lines, braces, is_fine) in [(70, 6, true), (71, 1, false), (1, 7, false)] {
        let body = ["{".repeat(braces), "\n".repeat(lines - 1), "}".repeat(braces)].concat();
        let found = problems_of("buf.rs", &format!("trait A {{ fn a(&self, b: [u8; 2]); }}\nfn f(){body}"));
        assert_eq!(found.len(), usize::from(!is_fine), "{found:?}");
        let told = format!("fn f has {lines} lines and nests {braces} ");
        assert!(found.iter().all(|it| it.contains(&told)), "{found:?}");
    }
}

#[test]
fn the_map_must_say_what_the_floors_say() {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    assert!(problems_of("lib.rs", &lib).is_empty());
    assert_eq!(problems_of("lib.rs", &lib.replace("[`conn`]", "[`net`]")).len(), 1);
    assert_eq!(problems_of("lib.rs", &lib.replace("//! | 3 |", "//! | 4 |")).len(), 1);
}
