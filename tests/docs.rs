//! The documents: whatever is cited exists, and what the agent has stands in them: keys, metrics, exit codes, error
//! codes, environment variables, commands and options.
//!
//! What the agent has is taken from the running binary where it tells it, else from the sources.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::{Agent, binary, command, emulator};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A newcomer reads the README; what needs more room has a document of its own.
const README_LINES_MAX: usize = 180;
/// The document that rules.
const CONTRACT: &str = "docs/contract.md";
/// Where people and programs cite documents.
const CITING: &[&str] = &[
    ".ci",
    "benches",
    "docs",
    "emulator",
    "examples",
    "fuzz/fuzz_targets",
    "fuzz/src",
    "packaging",
    "src",
    "tests",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn text(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Every text file that may cite a document, with its path below the root.
fn files() -> Vec<(String, String)> {
    let mut paths: Vec<PathBuf> = vec!["fuzz/README.md".into()];
    for entry in fs::read_dir(root()).unwrap() {
        let entry = entry.unwrap();
        let name = PathBuf::from(entry.file_name());
        if entry.file_type().unwrap().is_file()
            && name.extension().is_some_and(|it| it == "md" || it == "toml")
        {
            paths.push(name);
        }
    }
    let mut folders: Vec<PathBuf> = CITING.iter().map(PathBuf::from).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let path = folder.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() { folders.push(path) } else { paths.push(path) }
        }
    }
    // What is not text cites nothing.
    let read =
        |path: &PathBuf| Some((path.to_str()?.to_owned(), fs::read_to_string(root().join(path)).ok()?));
    let mut files: Vec<(String, String)> = paths.iter().filter_map(read).collect();
    files.sort();
    files
}

// ---- Markdown ----

/// The lines outside of fenced code.
fn prose(markdown: &str) -> impl Iterator<Item = &str> {
    let mut in_code = false;
    markdown.lines().filter(move |line| {
        let fence = line.trim_start().starts_with("```");
        in_code ^= fence;
        !in_code && !fence
    })
}

/// The headings, without their marks.
fn headings(markdown: &str) -> Vec<&str> {
    prose(markdown)
        .filter(|line| line.starts_with('#'))
        .map(|line| line.trim_start_matches('#').trim())
        .collect()
}

/// The anchors that GitHub gives the headings.
fn anchors(markdown: &str) -> BTreeSet<String> {
    let anchor = |heading: &str| -> String {
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
    };
    headings(markdown).into_iter().map(anchor).collect()
}

/// What follows a heading up to the next one of its kind or above.
fn section<'a>(markdown: &'a str, heading: &str) -> &'a str {
    let begin = markdown.find(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading:?}"));
    let rest = &markdown[begin + 1..];
    let level = heading.split(' ').next().unwrap();
    let end = (1..=level.len()).filter_map(|n| rest.find(&format!("\n{} ", "#".repeat(n)))).min();
    &rest[..end.unwrap_or(rest.len())]
}

/// The cells of each table row.
fn rows(markdown: &str) -> Vec<Vec<String>> {
    let cells = |line: &str| -> Vec<String> {
        let line = line.trim().trim_start_matches('|').trim_end_matches('|');
        line.split('|').map(|cell| cell.trim().to_owned()).collect()
    };
    prose(markdown).filter(|line| line.starts_with('|') && !line.starts_with("|---")).map(cells).collect()
}

/// The code spans.
fn spans(markdown: &str) -> BTreeSet<&str> {
    markdown.split('`').skip(1).step_by(2).collect()
}

/// The targets of all links and images.
fn links(markdown: &str) -> Vec<String> {
    let mut links = Vec::new();
    for line in prose(markdown) {
        // A link's text may be a code span; what looks like a link within one is none.
        let mut plain = String::new();
        for (number, part) in line.split('`').enumerate() {
            plain += if number % 2 == 0 { part } else { "code" };
        }
        let targets = plain.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        links.extend(targets.map(str::to_owned));
    }
    links
}

// ---- Citations ----

/// What is wrong with a link of a document; `None`: it leads somewhere.
fn dead(document: &str, markdown: &str, link: &str) -> Option<String> {
    if link.starts_with("https://") || link.starts_with("http://") {
        return None;
    }
    let (path, anchor) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
    let target = root().join(document).parent().unwrap().join(path);
    if !path.is_empty() && (path.starts_with('/') || !target.exists()) {
        return Some(format!("{document}: ({link}) leads nowhere"));
    }
    let there = if path.is_empty() { Some(markdown.to_owned()) } else { fs::read_to_string(&target).ok() };
    let known = anchor.is_none_or(|anchor| there.is_some_and(|there| anchors(&there).contains(anchor)));
    (!known).then(|| format!("{document}: ({link}) names no heading there"))
}

/// The documents that a text cites by their path, each with what follows it.
fn citations(text: &str) -> Vec<(String, String)> {
    // A citation may go on in the next line of a comment.
    let lines: Vec<&str> = text
        .lines()
        .map(|line| line.trim_start().trim_start_matches(['/', '!', '#', '*', '>']).trim())
        .collect();
    let text = lines.join(" ");
    let mut found = Vec::new();
    for (end, _) in text.match_indices(".md") {
        let is_path = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
        let begin = text[..end].rfind(|c: char| !is_path(c)).map_or(0, |at| at + 1);
        let rest = &text[end + 3..];
        // `.md` is an ending by itself, too.
        if begin < end && !rest.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            found.push((text[begin..end + 3].to_owned(), rest.chars().take(80).collect()));
        }
    }
    found
}

/// The number in `, section 3`.
fn cited_section(rest: &str) -> Option<u32> {
    let rest = rest.trim_start_matches('`').strip_prefix(", section ")?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// What is wrong with the citations in a file.
fn problems(file: &str, text: &str) -> Vec<String> {
    let mut problems = Vec::new();
    let is_said = file.starts_with("docs/") || text.contains(CONTRACT);
    if text.to_lowercase().contains("contract") && !is_said {
        problems.push(format!("{file} speaks of a contract and does not say which document that is"));
    }
    for (path, rest) in citations(text) {
        let beside = root().join(file).parent().unwrap().join(&path);
        let target = if root().join(&path).exists() { root().join(&path) } else { beside };
        let Ok(there) = fs::read_to_string(&target) else {
            problems.push(format!("{file} cites {path}, which is not there"));
            continue;
        };
        if let Some(number) = cited_section(&rest)
            && !headings(&there).iter().any(|heading| heading.starts_with(&format!("{number}. ")))
        {
            problems.push(format!("{file} cites {path}, section {number}, which is not there"));
        }
    }
    problems
}

#[test]
fn no_link_is_dead() {
    let mut count = 0;
    let mut dead_links = Vec::new();
    for (document, markdown) in files().iter().filter(|(name, _)| name.ends_with(".md")) {
        let links = links(markdown);
        count += links.len();
        dead_links.extend(links.iter().filter_map(|link| dead(document, markdown, link)));
    }
    assert!(count > 50, "{count} links");
    assert!(dead_links.is_empty(), "{}", dead_links.join("\n"));
}

#[test]
fn cited_documents_and_sections_exist() {
    let files = files();
    assert!(files.len() > 100, "{} files", files.len());
    let problems: Vec<String> = files.iter().flat_map(|(name, text)| problems(name, text)).collect();
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    let readme = text("README.md");
    for (name, _) in files.iter().filter(|(name, _)| name.starts_with("docs/") && name.ends_with(".md")) {
        assert!(links(&readme).contains(name), "the README does not lead to {name}");
    }
}

#[test]
fn dead_links_and_citations_are_found() {
    let markdown =
        "# A `b`: c, d\n[x](#a-b-c-d) [y](#nowhere) `[z](nowhere)`\n```\n[z](nowhere)\n# No\n```\n";
    let found = |link: &str| dead(CONTRACT, markdown, link).is_some();
    assert_eq!(links(markdown), ["#a-b-c-d", "#nowhere"]);
    assert!(!found("#a-b-c-d") && found("#no") && found("nowhere") && found("/etc/passwd"));
    // Put together, so that it is not a citation of this file.
    let ending = "md";
    let beside = |anchor: &str| format!("contract.{ending}#{anchor}");
    assert!(!found(&beside("1-command-line")) && found(&beside("command-line")));
    for (text, count) in [
        (format!("//! see `docs/contract.{ending}`,\n//! section 3."), 0),
        (format!("/// docs/contract.{ending}, section 99"), 1),
        (format!("# docs/nowhere.{ending}"), 1),
        (format!("\"*.{ending}\" .{ending}x"), 0),
        (format!("CONTRACT.{ending} and KMS_PROTOCOL.{ending}"), 3),
        ("section 3 of the contract".to_owned(), 1),
    ] {
        assert_eq!(problems("src/lib.rs", &text).len(), count, "{text}");
    }
    assert_eq!(cited_section("`, section 12."), Some(12));
}

// ---- What the agent has ----

#[test]
fn the_readme_is_a_newcomers_page() {
    let readme = text("README.md");
    assert!(readme.lines().count() <= README_LINES_MAX, "{} lines", readme.lines().count());
    assert!(readme.contains("cargo test --workspace"));
}

/// Keys with their defaults, as the sample shows them; `src/config/tests.rs` holds that these are all.
fn keys() -> Vec<(String, String)> {
    let sample = text("packaging/config.toml");
    let keys: Vec<(String, String)> = sample
        .lines()
        .filter_map(|line| line.strip_prefix('#')?.split_once(" = "))
        .filter(|(key, _)| key.starts_with(|c: char| c.is_ascii_alphabetic()))
        .map(|(key, default)| (key.to_owned(), default.to_owned()))
        .collect();
    assert!(keys.len() > 20, "{keys:?}");
    keys
}

#[test]
fn every_key_stands_in_the_documents_with_its_default() {
    let (contract, configuration) = (text(CONTRACT), text("docs/configuration.md"));
    // Section, key, default, range; and without the section.
    for (document, markdown, column) in [
        ("the contract", section(&contract, "## 2. Configuration file"), 1),
        ("docs/configuration", section(&configuration, "## Keys"), 0),
    ] {
        let rows = rows(markdown);
        let shown: Vec<&str> =
            rows.iter().map(|row| row[column].trim_matches('`')).filter(|key| *key != "Key").collect();
        let keys = keys();
        assert_eq!(shown, keys.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), "{document}");
        for ((key, default), row) in keys.iter().zip(rows.iter().filter(|row| row[column] != "Key")) {
            // An empty string stands for what the words there say.
            let plain = |text: &str| text.trim_matches('`').trim_matches('"').to_owned();
            assert!(default == "\"\"" || plain(&row[column + 1]) == plain(default), "{document}: {key}");
        }
    }
}

#[test]
fn every_metric_and_error_code_stands_in_the_documents() {
    let emulator = emulator(&[("a", "1")]);
    let agent = Agent::start(&emulator);
    // With the credentials comes the last metric.
    assert_eq!(agent.secret("a").status, 200);
    let metrics = agent.get_with("/metrics", &[]).text();

    let operating = text("docs/operating.md");
    let catalogue = section(&operating, "## Metrics");
    let names = |row: &Vec<String>| -> Vec<String> {
        let names = spans(&row[0]).into_iter().map(|span| span.split('{').next().unwrap().to_owned());
        names.collect()
    };
    let shown: BTreeSet<String> = rows(catalogue).iter().flat_map(names).collect();
    let told: BTreeSet<String> = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next().map(str::to_owned))
        .collect();
    assert!(told.len() > 15, "{told:?}");
    assert_eq!(shown, told, "docs/operating shows, /metrics tells");

    let (contract, clients, troubleshooting) =
        (text(CONTRACT), text("docs/clients.md"), text("docs/troubleshooting.md"));
    let results: BTreeSet<&str> =
        metrics.lines().filter_map(|line| line.split_once("result=\"")?.1.split('"').next()).collect();
    let (codes, results): (Vec<&str>, Vec<&str>) =
        results.into_iter().partition(|result| result.starts_with(|c: char| c.is_ascii_uppercase()));
    assert!(codes.len() > 10 && results.len() > 10, "{codes:?} {results:?}");
    for code in codes {
        let tables = [section(&contract, "## 3. Local HTTP API"), section(&contract, "## 4. Reply bodies")];
        assert!(tables.iter().any(|table| spans(table).contains(code)), "{code} is not in the contract");
        for (name, document) in [("clients", &clients), ("troubleshooting", &troubleshooting)] {
            assert!(spans(document).contains(code), "{code} is not in docs/{name}");
        }
    }
    for result in results {
        assert!(spans(catalogue).contains(result), "the result {result} is not in docs/operating");
    }
}

fn help(name: &str) -> String {
    let words = name.split_whitespace().chain(["--help"]);
    let output = command(binary()).args(words).output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

/// The commands that the general help lists.
fn commands() -> Vec<String> {
    let help = help("");
    let (_, list) = help.split_once("\nCommands:\n").expect("--help has a list of commands");
    let list = list.split("\n\n").next().unwrap();
    let commands: Vec<String> = list
        .lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .map(|line| line.split_whitespace().next().unwrap().to_owned())
        .collect();
    assert!(commands.len() > 5, "{commands:?}");
    commands
}

#[test]
fn every_exit_code_stands_in_the_contract() {
    let mut codes = BTreeSet::new();
    for (name, source) in files().iter().filter(|(name, _)| name.starts_with("src/cli")) {
        for line in source.lines().filter(|line| line.contains("const ")) {
            if let Some((_, value)) = line.split_once(": u8 = ") {
                let value = value.trim_end_matches(';');
                codes.insert(value.parse::<u8>().unwrap_or_else(|_| panic!("{name}: {line}")));
            }
        }
    }
    for command in commands() {
        let help = help(&command);
        let paragraph = help.split("\n\n").find_map(|it| it.strip_prefix("Exit codes: "));
        let paragraph = paragraph.unwrap_or_else(|| panic!("the help of {command} names no exit codes"));
        codes.extend(paragraph.split_whitespace().filter_map(|word| word.parse::<u8>().ok()));
    }
    assert!(codes.len() >= 8, "{codes:?}");
    let contract = text(CONTRACT);
    let table = rows(section(&contract, "## 1. Command line"));
    let shown: BTreeSet<u8> = table.iter().filter_map(|row| row[0].parse().ok()).collect();
    assert_eq!(shown, codes, "the contract shows, the agent has");
}

#[test]
fn every_command_and_option_stands_in_the_contract() {
    let contract = text(CONTRACT);
    let table = rows(section(&contract, "## 1. Command line"));
    for command in commands() {
        let own = |row: &&Vec<String>| row[0].starts_with(&format!("`kms-agent {command} "));
        let usage: String = table.iter().filter(own).map(|row| row[0].as_str()).collect();
        assert!(!usage.is_empty(), "the contract does not know {command}");
        let help = help(&command);
        let (_, options) = help.split_once("\nOptions:\n").expect("a list of options");
        let options = options.split("\n\n").next().unwrap();
        let words =
            options.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with("--")));
        for option in words.map(|word| word.trim_end_matches(',')).filter(|option| *option != "--help") {
            assert!(usage.contains(option), "the contract does not know {option} of {command}");
        }
    }
    for file in ["README.md", CONTRACT] {
        let markdown = text(file);
        for command in commands() {
            assert!(markdown.contains(&format!("`kms-agent {command}")), "{file} does not know {command}");
        }
    }
}

#[test]
fn every_environment_variable_stands_in_the_documents() {
    let configuration = text("docs/configuration.md");
    let shown = spans(section(&configuration, "## Environment variables"));
    let mut found = BTreeSet::new();
    for (_, source) in files().iter().filter(|(name, _)| name.starts_with("src/")) {
        for (at, _) in source.match_indices("ALIBABA_CLOUD_") {
            let end =
                source[at..].find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'));
            found.insert(source[at..at + end.unwrap_or(source.len() - at)].to_owned());
        }
    }
    assert!(found.len() > 10, "{found:?}");
    for name in found {
        assert!(shown.contains(name.as_str()), "{name} is not in docs/configuration");
    }
}
