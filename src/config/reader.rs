//! Reads the TOML tree: each value into its place, each problem with its line.

use std::fmt::Display;
use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue, Error as SyntaxError};

use super::{
    COMPARED_BYTES_MAX, FOUND_CHARS_MAX, LIKENESS_MIN, Problem, ResponseType, SECTIONS, SYNTAX_ERRORS_MAX,
};

/// Gathers the problems of a file.
pub(super) struct Reader<'t> {
    text: &'t str,
    /// Offset of each line's first byte.
    line_starts: Vec<usize>,
    /// Where the syntax is wrong, sorted. What was recovered from such places is not judged.
    broken: Vec<usize>,
    problems: Vec<Problem>,
}

impl<'t> Reader<'t> {
    pub(super) fn new(text: &'t str, root: &DeTable<'_>, syntax_errors: &[SyntaxError]) -> Reader<'t> {
        let after_breaks = text.bytes().enumerate().filter(|&(_, byte)| byte == b'\n');
        let line_starts = after_breaks.map(|(offset, _)| offset.saturating_add(1));
        let mut reader = Reader {
            text,
            line_starts: std::iter::once(0).chain(line_starts).collect(),
            broken: Vec::new(),
            problems: Vec::new(),
        };
        reader.report_syntax(root, syntax_errors);
        reader
    }

    /// Line of a byte, from 1.
    pub(super) fn line(&self, offset: usize) -> usize {
        self.line_starts.partition_point(|&start| start <= offset)
    }

    /// One problem for each line and value with syntax errors: the first.
    pub(super) fn report_syntax(&mut self, root: &DeTable<'_>, syntax_errors: &[SyntaxError]) {
        let end = self.text.len();
        let mut errors: Vec<_> =
            syntax_errors.iter().map(|error| (error.span().unwrap_or(end..end), error.message())).collect();
        errors.sort_by_key(|(span, _)| span.start);
        self.broken = errors.iter().map(|(span, _)| span.start).collect();
        errors.dedup_by_key(|(span, _)| self.line(span.start));

        let mut values: Vec<_> =
            root.values().filter_map(|value| value.get_ref().as_table()).flat_map(DeTable::values).collect();
        values.sort_by_key(|value| value.span().start);
        let mut reported_until = 0;
        let mut reported = 0;
        for (span, message) in errors {
            if span.start < reported_until {
                continue;
            }
            reported += 1;
            if reported > SYNTAX_ERRORS_MAX {
                break;
            }
            let mut within = String::new();
            let before = values.partition_point(|value| value.span().start <= span.start);
            if let Some(value) = before.checked_sub(1).and_then(|last| values.get(last)) {
                reported_until = value.span().end;
                let begin = self.line(value.span().start);
                if span.start < reported_until && begin < self.line(span.start) {
                    within = format!(" (within the value that begins in line {begin})");
                }
            }
            // Only a name of ours is safe to be shown: anything else may be part of a secret.
            let at = match self.text.get(span.clone()).filter(|name| is_known(name)) {
                Some(name) => format!(" at {name}"),
                None => String::new(),
            };
            let message = format!("syntax error{at}: {message}{within}");
            self.problems.push(Problem {
                line: Some(self.line(span.start)),
                key: None,
                found: None,
                message,
            });
        }
    }

    /// `true` if the syntax is wrong in this place, or anywhere on its first line.
    pub(super) fn is_broken(&self, span: &Range<usize>) -> bool {
        self.is_line_broken(self.line(span.start)) || self.is_syntax_wrong_in(span.start, span.end)
    }

    pub(super) fn is_line_broken(&self, line: usize) -> bool {
        let start = |line: usize| self.line_starts.get(line.saturating_sub(1)).copied().unwrap_or(usize::MAX);
        self.is_syntax_wrong_in(start(line), start(line.saturating_add(1)))
    }

    pub(super) fn is_syntax_wrong_in(&self, start: usize, end: usize) -> bool {
        let first = self.broken.partition_point(|&offset| offset < start);
        self.broken.get(first).is_some_and(|&offset| offset < end)
    }

    /// Reports a problem of the key or value at `span`.
    pub(super) fn report(
        &mut self,
        span: &Range<usize>,
        key: String,
        found: Option<String>,
        message: String,
    ) {
        if !self.is_broken(span) {
            let line = Some(self.line(span.start));
            self.problems.push(Problem { line, key: Some(key), found, message });
        }
    }

    /// Reports unknown sections and keys.
    pub(super) fn report_unknown(&mut self, root: &DeTable<'_>) {
        for (name, value) in root {
            let (span, name) = (name.span(), name.get_ref().as_ref());
            match (SECTIONS.iter().find(|(section, _)| *section == name), value.get_ref()) {
                (Some((section, keys)), DeValue::Table(table)) => {
                    for key in table.keys().filter(|key| !keys.contains(&key.get_ref().as_ref())) {
                        let message = format!("unknown key; {}", hint(Some((section, keys)), key.get_ref()));
                        self.report(
                            &key.span(),
                            format!("[{section}] {}", excerpt(key.get_ref())),
                            None,
                            message,
                        );
                    }
                }
                (Some((section, _)), _) => {
                    let message = format!("must be one section: a line [{section}], its keys below it");
                    self.report(&span, format!("[{section}]"), None, message);
                }
                // After a header without its `]` the next key is taken for a section.
                (None, DeValue::Table(_)) if self.is_line_broken(self.line(span.start).saturating_sub(1)) => {
                }
                (None, DeValue::Table(_)) => {
                    let message = format!("unknown section; {}", section_hint(name));
                    self.report(&span, format!("[{}]", excerpt(name)), None, message);
                }
                (None, _) => {
                    let message = format!("a key outside of any section; {}", hint(None, name));
                    self.report(&span, excerpt(name), None, message);
                }
            }
        }
    }

    pub(super) fn section<'r>(&'r mut self, root: &'r DeTable<'t>, name: &'static str) -> Section<'r, 't> {
        let table = root.get(name).and_then(|value| value.get_ref().as_table());
        Section { name, table, reader: self }
    }

    pub(super) fn into_problems(mut self) -> Vec<Problem> {
        self.problems.sort_by_key(|problem| problem.line.unwrap_or(usize::MAX));
        self.problems
    }
}

/// One section being read. Its methods put a valid value where it belongs, report any other, and
/// leave the default where there is none.
pub(super) struct Section<'r, 't> {
    name: &'static str,
    table: Option<&'r DeTable<'t>>,
    reader: &'r mut Reader<'t>,
}

/// Whether names that differ in case only are different names.
#[derive(Clone, Copy)]
pub(super) enum Case {
    Matters,
    Ignored,
}

impl<'r, 't> Section<'r, 't> {
    pub(super) fn value(&self, key: &str) -> Option<&'r Spanned<DeValue<'t>>> {
        self.table?.get(key)
    }

    /// `true` if there is no such key, or an empty string.
    pub(super) fn is_unset(&self, key: &str) -> bool {
        self.value(key).is_none_or(|value| value.get_ref().as_str() == Some(""))
    }

    /// Reports a problem of a key's value.
    pub(super) fn problem(&mut self, key: &str, message: String) {
        if let Some(value) = self.value(key) {
            self.problem_at(key, value, message);
        }
    }

    /// Reports a problem of `value`, which is a key's or an element of it.
    pub(super) fn problem_at(&mut self, key: &str, value: &Spanned<DeValue<'_>>, message: String) {
        let span = value.span();
        let found = self.reader.text.get(span.clone()).map(excerpt);
        self.reader.report(&span, format!("[{}] {key}", self.name), found, message);
    }

    /// A whole number in `range`.
    pub(super) fn integer<T>(&mut self, key: &str, range: RangeInclusive<T>, slot: &mut T)
    where
        T: Copy + Display + PartialOrd + TryFrom<i128>,
    {
        let allowed = format!("{} to {}", range.start(), range.end());
        if let Some(number) = self.number(key, &allowed) {
            match T::try_from(number).ok().filter(|number| range.contains(number)) {
                Some(number) => *slot = number,
                None => self.problem(key, format!("must be {allowed}")),
            }
        }
    }

    /// A whole number; one past 128 bits counts as the largest. `allowed` says which ones, for messages.
    pub(super) fn number(&mut self, key: &str, allowed: &str) -> Option<i128> {
        let value = self.value(key)?;
        let must = match value.get_ref() {
            DeValue::Integer(number) => {
                return Some(i128::from_str_radix(number.as_str(), number.radix()).unwrap_or(i128::MAX));
            }
            DeValue::String(text) if text.trim().parse::<i128>().is_ok() => {
                "must be a whole number without quotes,".to_owned()
            }
            DeValue::Float(_) => "must be a whole number without a fraction,".to_owned(),
            other => format!("must be a whole number and not {},", kind(other)),
        };
        self.problem(key, format!("{must} {allowed}"));
        None
    }

    /// A whole number of seconds.
    pub(super) fn seconds(&mut self, key: &str, range: RangeInclusive<u64>, slot: &mut Duration) {
        let mut seconds = slot.as_secs();
        self.integer(key, range, &mut seconds);
        *slot = Duration::from_secs(seconds);
    }

    pub(super) fn response_type(&mut self, key: &str, slot: &mut ResponseType) {
        const ALLOWED: &str = "0 (KMS), 1 (AWS) or 2 (HashiCorp KV)";
        match self.number(key, ALLOWED) {
            None => {}
            Some(0) => *slot = ResponseType::Kms,
            Some(1) => *slot = ResponseType::Aws,
            Some(2) => *slot = ResponseType::Vault,
            Some(_) => self.problem(key, format!("must be {ALLOWED}")),
        }
    }

    pub(super) fn boolean(&mut self, key: &str, slot: &mut bool) {
        match self.value(key).map(Spanned::get_ref) {
            None => {}
            Some(DeValue::Boolean(value)) => *slot = *value,
            Some(DeValue::String(_)) => self.problem(key, "must be true or false without quotes".to_owned()),
            Some(other) => self.problem(key, format!("must be true or false and not {}", kind(other))),
        }
    }

    /// A string that `read` makes a value of.
    pub(super) fn text<T>(&mut self, key: &str, read: impl FnOnce(&str) -> Result<T, String>, slot: &mut T) {
        let Some(value) = self.value(key) else { return };
        let result = match value.get_ref() {
            DeValue::String(text) => read(text),
            other => Err(format!("must be a string in quotes and not {}", kind(other))),
        };
        match result {
            Ok(value) => *slot = value,
            Err(message) => self.problem(key, message),
        }
    }

    /// The same, where an empty string is none.
    pub(super) fn optional<T>(
        &mut self,
        key: &str,
        read: impl FnOnce(&str) -> Result<T, String>,
        slot: &mut Option<T>,
    ) {
        if !self.is_unset(key) {
            self.text(key, |text| read(text).map(Some), slot);
        }
    }

    /// A list of strings that `read` checks, and none of them twice.
    pub(super) fn list(
        &mut self,
        key: &str,
        count: RangeInclusive<usize>,
        read: fn(&str) -> Result<String, String>,
        case: Case,
        slot: &mut Vec<String>,
    ) {
        let values = match self.value(key).map(Spanned::get_ref) {
            None => return,
            Some(DeValue::Array(values)) => values,
            Some(DeValue::String(_)) => {
                return self.problem(key, "must be a list of strings: [\"..\", \"..\"]".to_owned());
            }
            Some(other) => {
                return self.problem(key, format!("must be a list of strings and not {}", kind(other)));
            }
        };
        if !count.contains(&values.len()) {
            let message =
                format!("must have {} to {} elements, has {}", count.start(), count.end(), values.len());
            return self.problem(key, message);
        }
        let mut names: Vec<String> = Vec::with_capacity(values.len());
        for value in values.iter() {
            let result = match value.get_ref() {
                DeValue::String(text) => read(text),
                other => Err(format!("each element must be a string in quotes and not {}", kind(other))),
            };
            let is_same = |name: &str, other: &str| match case {
                Case::Matters => name == other,
                Case::Ignored => name.eq_ignore_ascii_case(other),
            };
            match result {
                Ok(name) if names.iter().any(|other| is_same(&name, other)) => {
                    self.problem_at(key, value, "is in the list twice".to_owned());
                }
                Ok(name) => names.push(name),
                Err(message) => self.problem_at(key, value, message),
            }
        }
        *slot = names;
    }
}

/// What a value is, with its article.
pub(super) fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) | DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// A value or name of the file for a message: its first line, shortened, without control characters.
pub(super) fn excerpt(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let mut shown: String = line
        .chars()
        .take(FOUND_CHARS_MAX)
        .map(|c| if c.is_ascii() && !c.is_ascii_control() { c.into() } else { c.escape_debug().to_string() })
        .collect();
    if line.chars().nth(FOUND_CHARS_MAX).is_some() || line.len() < text.trim_end().len() {
        shown.push('…');
    }
    shown
}

/// `true` for the name of a section or key.
pub(super) fn is_known(name: &str) -> bool {
    SECTIONS.iter().any(|(section, keys)| *section == name || keys.contains(&name))
}

/// How alike two names are, from 0 to 1. Case and marks between words do not count.
pub(super) fn likeness(name: &str, known: &str) -> f64 {
    if name.len() > COMPARED_BYTES_MAX {
        return 0.0;
    }
    let plain = |name: &str| -> String {
        name.chars().filter(|c| !matches!(c, '_' | '-' | ' ')).map(|c| c.to_ascii_lowercase()).collect()
    };
    strsim::normalized_damerau_levenshtein(&plain(name), &plain(known))
}

/// The candidate most like `name`, the first of several, if it is alike enough to be meant.
pub(super) fn nearest<T>(
    name: &str,
    candidates: impl Iterator<Item = (T, &'static str)>,
) -> Option<(T, &'static str)> {
    let mut best = None;
    let mut best_likeness = LIKENESS_MIN;
    for (place, known) in candidates {
        let likeness = likeness(name, known);
        if likeness > best_likeness || (best.is_none() && likeness >= best_likeness) {
            (best, best_likeness) = (Some((place, known)), likeness);
        }
    }
    best
}

/// What the unknown key `name` in `section` was meant to be; `None`: it is in no section.
pub(super) fn hint(section: Option<(&str, &[&'static str])>, name: &str) -> String {
    let own = section.into_iter().flat_map(|(_, keys)| keys.iter().map(|&key| (None, key)));
    let others = SECTIONS
        .iter()
        .filter(|(other, _)| section.is_none_or(|(own, _)| own != *other))
        .flat_map(|(other, keys)| keys.iter().map(|&key| (Some(*other), key)));
    match (nearest(name, own.chain(others)), section) {
        (Some((Some(place), known)), _) if known == name => format!("it belongs in [{place}]"),
        (Some((Some(place), known)), _) => format!("did you mean {known} in [{place}]?"),
        (Some((None, known)), _) if known.eq_ignore_ascii_case(name) => {
            format!("did you mean {known}? (upper and lower case matter)")
        }
        (Some((None, known)), _) => format!("did you mean {known}?"),
        (None, Some((section, keys))) => format!("[{section}] knows {}", keys.join(", ")),
        (None, None) => sections(),
    }
}

/// What the unknown section `name` was meant to be.
pub(super) fn section_hint(name: &str) -> String {
    match nearest(name, SECTIONS.iter().map(|&(section, _)| ((), section))) {
        Some(((), known)) => format!("did you mean [{known}]?"),
        None => sections(),
    }
}

pub(super) fn sections() -> String {
    let names: Vec<_> = SECTIONS.iter().map(|(section, _)| format!("[{section}]")).collect();
    format!("the sections are {}", names.join(", "))
}
