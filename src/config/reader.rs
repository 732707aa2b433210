//! Reads the TOML tree: each value into its place, each problem with its line.

use super::names::{SECTIONS, hint, is_known, section_hint};
use super::problem::Problem;
use super::sections::ResponseType;
use crate::text::{self, ELLIPSIS};
use std::fmt::Display;
use std::ops::{Range, RangeInclusive};
use std::time::Duration;
use toml::Spanned;
use toml::de::{DeTable, DeValue, Error as SyntaxError};

/// Lines reported for their syntax errors: past a few they only follow from each other.
pub(super) const SYNTAX_ERRORS_MAX: usize = 5;
/// Bytes of a wrong value that a message shows.
const FOUND_BYTES_MAX: usize = 63;

/// Gathers the problems of a file.
pub(super) struct Findings<'t> {
    text: &'t str,
    /// Offset of each line's first byte.
    line_starts: Vec<usize>,
    problems: Vec<Problem>,
}

impl<'t> Findings<'t> {
    pub(super) fn new(text: &'t str) -> Findings<'t> {
        let after_breaks = text.bytes().enumerate().filter(|&(_, byte)| byte == b'\n');
        let line_starts = after_breaks.map(|(offset, _)| offset.saturating_add(1));
        Findings { text, line_starts: std::iter::once(0).chain(line_starts).collect(), problems: Vec::new() }
    }

    /// Line of a byte, from 1.
    fn line(&self, offset: usize) -> usize {
        self.line_starts.partition_point(|&start| start <= offset)
    }

    /// Reports the first lines whose syntax is wrong, each for its first error.
    pub(super) fn report_syntax(&mut self, errors: &[SyntaxError]) {
        let end = self.text.len();
        let mut errors: Vec<_> =
            errors.iter().map(|error| (error.span().unwrap_or(end..end), error.message())).collect();
        errors.sort_by_key(|(span, _)| span.start);
        errors.dedup_by_key(|(span, _)| self.line(span.start));
        for (span, message) in errors.into_iter().take(SYNTAX_ERRORS_MAX) {
            // Only a name of ours is safe to be shown: anything else may be part of a secret.
            let at = match self.text.get(span.clone()).filter(|name| is_known(name)) {
                Some(name) => format!(" at {name}"),
                None => String::new(),
            };
            let (line, message) = (Some(self.line(span.start)), format!("syntax error{at}: {message}"));
            self.problems.push(Problem { line, key: None, found: None, message });
        }
    }

    /// Reports a problem of the key or value at `span`.
    fn report(&mut self, span: &Range<usize>, key: String, found: Option<String>, message: String) {
        let line = Some(self.line(span.start));
        self.problems.push(Problem { line, key: Some(key), found, message });
    }

    /// Reports unknown sections and keys.
    pub(super) fn report_unknown(&mut self, root: &DeTable<'_>) {
        for (name, value) in root {
            let (span, name) = (name.span(), name.get_ref().as_ref());
            let (key, message) =
                match (SECTIONS.iter().find(|(section, _)| *section == name), value.get_ref()) {
                    (Some((section, keys)), DeValue::Table(table)) => {
                        for key in table.keys().filter(|key| !keys.contains(&key.get_ref().as_ref())) {
                            let message =
                                format!("unknown key; {}", hint(Some((section, keys)), key.get_ref()));
                            self.report(
                                &key.span(),
                                format!("[{section}] {}", excerpt(key.get_ref())),
                                None,
                                message,
                            );
                        }
                        continue;
                    }
                    (Some((section, _)), _) => (
                        format!("[{section}]"),
                        format!("must be one section: a line [{section}] with its keys below it"),
                    ),
                    (None, DeValue::Table(_)) => {
                        (format!("[{}]", excerpt(name)), format!("unknown section; {}", section_hint(name)))
                    }
                    (None, _) => {
                        (excerpt(name), format!("this key is outside of any section; {}", hint(None, name)))
                    }
                };
            self.report(&span, key, None, message);
        }
    }

    pub(super) fn section<'r>(&'r mut self, root: &'r DeTable<'t>, name: &'static str) -> Section<'r, 't> {
        let table = root.get(name).and_then(|value| value.get_ref().as_table());
        Section { name, table, findings: self }
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
    findings: &'r mut Findings<'t>,
}

/// Whether names that differ in case only are different names.
#[derive(Clone, Copy)]
pub(super) enum Case {
    Matters,
    Ignored,
}

impl<'r, 't> Section<'r, 't> {
    fn value(&self, key: &str) -> Option<&'r Spanned<DeValue<'t>>> {
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
    fn problem_at(&mut self, key: &str, value: &Spanned<DeValue<'_>>, message: String) {
        let span = value.span();
        let found = self.findings.text.get(span.clone()).map(excerpt);
        self.findings.report(&span, format!("[{}] {key}", self.name), found, message);
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
    fn number(&mut self, key: &str, allowed: &str) -> Option<i128> {
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

    /// Like [`Section::text`], but an empty string means that the key is not set.
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
                format!("must have {} to {} elements, and has {}", count.start(), count.end(), values.len());
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
fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) | DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// A value or name of the file for a message: its first line.
fn excerpt(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let mut shown = text::excerpt(line, FOUND_BYTES_MAX);
    if line.len() < text.trim_end().len() && !shown.ends_with(ELLIPSIS) {
        shown.push(ELLIPSIS);
    }
    shown
}
