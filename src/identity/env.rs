//! The environment variables that name credentials.

use std::ffi::OsString;
use std::fmt;

/// Why a provider cannot be had with this configuration and environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotConfigured {
    /// It is not wanted: a variable is not set. The chain goes on to the next provider.
    Missing(String),
    /// It is wanted, but in a way that cannot be meant.
    Wrong(String),
}

impl fmt::Display for NotConfigured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotConfigured::Missing(what) | NotConfigured::Wrong(what) => f.write_str(what),
        }
    }
}

/// The environment. A variable that is set to nothing is as good as not set.
pub(crate) struct Env<'a>(pub(crate) &'a dyn Fn(&str) -> Option<OsString>);

impl Env<'_> {
    /// A variable's value.
    /// Errors: when it is not UTF-8.
    pub(crate) fn text(&self, name: &str) -> Result<Option<String>, NotConfigured> {
        let value = (self.0)(name).map(OsString::into_string).transpose();
        let value =
            value.map_err(|_| NotConfigured::Wrong(format!("the value of {name} is not UTF-8 text")))?;
        Ok(value.filter(|value| !value.is_empty()))
    }

    /// Whether a variable says `true`, in any case.
    pub(crate) fn is_true(&self, name: &str) -> bool {
        (self.0)(name).is_some_and(|value| value.eq_ignore_ascii_case("true"))
    }

    /// The values of variables that must all be set.
    /// Errors: those that are not set, or that one is not UTF-8.
    pub(crate) fn need<const N: usize>(&self, names: [&str; N]) -> Result<[String; N], NotConfigured> {
        let is_missing = |name: &&&str| (self.0)(name).is_none_or(|value| value.is_empty());
        let missing: Vec<&str> = names.iter().filter(is_missing).copied().collect();
        match missing.as_slice() {
            [] => {}
            [name] => {
                return Err(NotConfigured::Missing(format!("{name} is not set in the agent's environment")));
            }
            names => {
                return Err(NotConfigured::Missing(format!(
                    "{} are not set in the agent's environment",
                    names.join(", ")
                )));
            }
        }
        let mut values = [const { String::new() }; N];
        for (value, name) in values.iter_mut().zip(names) {
            *value = self.text(name)?.unwrap_or_default();
        }
        Ok(values)
    }
}
