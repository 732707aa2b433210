//! `kms-agent exec`: runs a program with secrets in its environment.

use super::args::{Stop, set_path};
use super::configuration::load;
use super::local::{self, AgentClient, SecretRequest};
use super::terminal::{FAILED, complain};
use crate::log::Reason;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use zeroize::Zeroizing;

/// The program is there and cannot be run; what shells, `env` and `nohup` answer then.
const CANNOT_RUN: u8 = 126;
/// There is no such program; likewise.
const NO_SUCH_PROGRAM: u8 = 127;

pub(super) const HELP: &str = "\
kms-agent exec - run a program with secrets in its environment

Usage: kms-agent exec --env NAME=SECRET_ID[#KEY] ... [--config FILE] -- CMD [ARG ...]

Gets the secrets from the running agent, then becomes CMD: same process, so that signals reach it
and its exit code is what the caller sees. If one secret cannot be had, CMD is not run. The rest of
the environment stays as it is. CMD keeps the values it was started with: to see a rotated secret
it must be started again.

Options:
      --env NAME=SECRET_ID         the secret's SecretData becomes the variable NAME
      --env NAME=SECRET_ID#KEY     only this member of a SecretData that is a JSON object
  -c, --config FILE                the agent's configuration; see 'kms-agent run --help'
  -h, --help                       print this

Example:
  kms-agent exec --env DB_USER=db#user --env DB_PASSWORD=db#password -- /usr/bin/app --port 80

Exit codes: CMD's own; before it runs: 1 a secret cannot be had, 2 wrong usage or configuration,
126 CMD cannot be run, 127 there is no CMD
";

/// What to run, and with what.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Options {
    config: Option<PathBuf>,
    variables: Vec<Variable>,
    program: OsString,
    arguments: Vec<OsString>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Variable {
    name: String,
    id: String,
    key: Option<String>,
}

pub(super) fn parse(parser: &mut lexopt::Parser, mut config: Option<PathBuf>) -> Result<Options, Stop> {
    use lexopt::Arg::{Long, Short, Value};
    let mut variables: Vec<Variable> = Vec::new();
    let mut program = loop {
        if let Some(mut rest) = parser.try_raw_args()
            && rest.next_if(|argument| argument == OsStr::new("--")).is_some()
        {
            break rest.collect::<Vec<OsString>>().into_iter();
        }
        match parser.next()? {
            Some(Short('h') | Long("help")) => return Err(Stop::Help),
            Some(Short('c') | Long("config")) => set_path(&mut config, "--config", parser)?,
            Some(Long("env")) => {
                let variable = Variable::parse(parser.value()?)?;
                if variables.iter().any(|known| known.name == variable.name) {
                    return Err(format!("--env: {} is set twice", variable.name).into());
                }
                variables.push(variable);
            }
            Some(Value(program)) => {
                return Err(format!("put -- before {program:?}, the program to run").into());
            }
            Some(other) => return Err(other.unexpected().into()),
            None => return Err("-- and the program to run are missing".into()),
        }
    };
    let name = program.next().ok_or("-- and the program to run are missing")?;
    if variables.is_empty() {
        return Err("there is no --env: without a secret there is nothing to do here".into());
    }
    Ok(Options { config, variables, program: name, arguments: program.collect() })
}

impl Variable {
    fn parse(value: OsString) -> Result<Variable, String> {
        let value = value.into_string().map_err(|value| format!("--env {value:?}: not UTF-8"))?;
        let wrong = |what: &str| format!("--env {value}: {what}");
        let Some((name, secret)) = value.split_once('=') else {
            return Err(wrong("must be NAME=SECRET_ID or NAME=SECRET_ID#KEY"));
        };
        // IEEE 1003.1 8.1: what shells can name.
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) || !name.chars().all(word) {
            return Err(wrong("before the = stands no name of a variable (letters, digits, _)"));
        }
        // No secret's name has a `#` in it.
        let (id, key) = match secret.rsplit_once('#') {
            Some((id, key)) => (id, Some(key)),
            None => (secret, None),
        };
        if id.is_empty() {
            return Err(wrong("SECRET_ID is missing"));
        }
        if key == Some("") {
            return Err(wrong("KEY is missing behind the #"));
        }
        Ok(Variable { name: name.to_owned(), id: id.to_owned(), key: key.map(str::to_owned) })
    }
}

/// The command. Comes back only if the program was not run; the result is the exit code then.
pub(super) fn main(options: Options) -> u8 {
    let loaded = match load(options.config) {
        Ok(loaded) => loaded,
        Err(exit_code) => return exit_code,
    };
    let found = AgentClient::of(&loaded.config).and_then(|agent| values(&agent, &options.variables));
    let values = match found {
        Ok(values) => values,
        Err(message) => {
            complain(&message);
            return FAILED;
        }
    };
    let mut command = std::process::Command::new(&options.program);
    command.args(&options.arguments);
    for (variable, value) in options.variables.iter().zip(&values) {
        command.env(&variable.name, value.as_str());
    }
    // Takes this process's place, unless it cannot.
    let error = command.exec();
    complain(&format_args!("cannot run {}: {}", options.program.display(), Reason(&error)));
    if error.kind() == io::ErrorKind::NotFound { NO_SUCH_PROGRAM } else { CANNOT_RUN }
}

/// The variables' values, in their order; a secret of which several fields are wanted is asked for once.
fn values(agent: &AgentClient<'_>, variables: &[Variable]) -> Result<Vec<Zeroizing<String>>, String> {
    let mut known: Vec<(&str, Zeroizing<String>)> = Vec::new();
    let mut values = Vec::new();
    for variable in variables {
        let failed = |what: &str| format!("{}={}: {what}", variable.name, variable.id);
        if !known.iter().any(|(id, _)| *id == variable.id) {
            let request = SecretRequest { id: variable.id.clone(), ..SecretRequest::default() };
            let body = agent.ask(&request).map_err(|what| failed(&what))?;
            let data = agent.secret_data(&body).ok_or_else(|| failed(local::UNUSABLE))?;
            known.push((&variable.id, data));
        }
        let data = known.iter().find(|(id, _)| *id == variable.id).map(|(_, data)| data);
        let data = data.ok_or_else(|| failed(local::UNUSABLE))?;
        let value = match &variable.key {
            Some(key) => local::field(data, key).map_err(|what| failed(&what))?,
            None => data.clone(),
        };
        if value.contains('\0') {
            return Err(failed("the value has a NUL character, which no variable can hold"));
        }
        values.push(value);
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_taken_apart() {
        let of = |name: &str, id: &str, key: Option<&str>| {
            Ok(Variable { name: name.into(), id: id.into(), key: key.map(Into::into) })
        };
        assert_eq!(Variable::parse("A=db".into()), of("A", "db", None));
        assert_eq!(Variable::parse("_a1=acs/ecs=x@y#k=1".into()), of("_a1", "acs/ecs=x@y", Some("k=1")));
    }

    #[test]
    fn what_follows_the_two_dashes_is_the_programs() {
        let words = ["--env", "A=a", "-c", "f", "--", "ls", "--env", "--", "-h"];
        let mut parser = lexopt::Parser::from_args(words.map(OsString::from));
        let Ok(options) = parse(&mut parser, None) else { panic!() };
        assert_eq!(options.program, "ls");
        assert_eq!(options.arguments, ["--env", "--", "-h"]);
        assert_eq!(options.config, Some("f".into()));
    }
}
