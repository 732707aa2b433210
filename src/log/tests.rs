//! Rotation, failing disks, the rate limit, foreign text.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use super::sink::{Notice, Output, Sink, Sinks};
use super::*;
use crate::text::{ELLIPSIS, ESCAPE_CHARS_MAX};
use crate::time::Mono;

/// A folder that goes when the test ends.
struct TempFolder(PathBuf);

impl TempFolder {
    fn new() -> TempFolder {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("kms-agent-log-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        TempFolder(path)
    }

    /// Names and contents, sorted.
    fn list(&self) -> Vec<(String, String)> {
        let mut files: Vec<_> = fs::read_dir(&self.0)
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| {
                (entry.file_name().into_string().unwrap(), fs::read_to_string(entry.path()).unwrap())
            })
            .collect();
        files.sort();
        files
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn at(seconds: u64) -> Mono {
    Mono::from_micros(seconds * 1_000_000)
}

fn log_file(folder: &Path, bytes_max: u64, backup_files: u32) -> LogFile {
    let mut file = LogFile::new(folder, &Settings { backup_files, ..Settings::default() });
    file.bytes_max = bytes_max;
    file
}

fn settings(folder: &Path) -> Settings {
    Settings { path: LogPath::Folder(folder.to_owned()), ..Settings::default() }
}

fn say(log: &LogHandle, level: Level, target: &str, text: &str) {
    log.logger.log(&Record::builder().level(level).target(target).args(format_args!("{text}")).build());
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}

#[test]
fn files_rotate_before_they_grow_past_their_size() {
    for (backup_files, expected) in [
        (0, &[("kms-agent.log", "six\n")][..]),
        (1, &[("kms-agent.log", "six\n"), ("kms-agent.log.1", "five5678\n")]),
        (
            2,
            &[
                ("kms-agent.log", "six\n"),
                ("kms-agent.log.1", "five5678\n"),
                ("kms-agent.log.2", "three\nfour\n"),
            ],
        ),
        (
            9,
            &[
                ("kms-agent.log", "six\n"),
                ("kms-agent.log.1", "five5678\n"),
                ("kms-agent.log.2", "three\nfour\n"),
                ("kms-agent.log.3", "one\ntwo\n"),
            ],
        ),
    ] {
        let temp = TempFolder::new();
        let mut file = log_file(&temp.0, 12, backup_files);
        for line in ["one\n", "two\n", "three\n", "four\n", "five5678\n", "six\n"] {
            assert_eq!(file.write(line.as_bytes(), at(1)).unwrap(), line.len());
        }
        assert_eq!(temp.list(), pairs(expected), "{backup_files} backups");
    }
}

#[test]
fn a_file_may_be_exactly_full_and_a_longer_line_has_one_of_its_own() {
    let temp = TempFolder::new();
    let mut file = log_file(&temp.0, 4, 9);
    for line in ["abc\n", "a long line\n", "x\n", "y\n"] {
        file.write(line.as_bytes(), at(1)).unwrap();
    }
    let expected =
        [("kms-agent.log", "x\ny\n"), ("kms-agent.log.1", "a long line\n"), ("kms-agent.log.2", "abc\n")];
    assert_eq!(temp.list(), pairs(&expected));
}

#[test]
fn a_restart_appends_and_counts_what_is_there() {
    let temp = TempFolder::new();
    log_file(&temp.0, 12, 1).write(b"before\n", at(1)).unwrap();
    let mut file = log_file(&temp.0, 12, 1);
    file.write(b"same\n", at(1)).unwrap();
    file.write(b"next\n", at(1)).unwrap();
    assert_eq!(temp.list(), pairs(&[("kms-agent.log", "next\n"), ("kms-agent.log.1", "before\nsame\n")]));
}

#[test]
fn backups_past_a_lowered_number_go() {
    let temp = TempFolder::new();
    for n in 1..=4 {
        fs::write(temp.0.join(format!("{FILE_NAME}.{n}")), n.to_string()).unwrap();
    }
    let mut file = log_file(&temp.0, 4, 2);
    file.write(b"old\n", at(1)).unwrap();
    file.write(b"new\n", at(1)).unwrap();
    let expected = [("kms-agent.log", "new\n"), ("kms-agent.log.1", "old\n"), ("kms-agent.log.2", "1")];
    assert_eq!(temp.list(), pairs(&expected));
}

#[test]
fn a_rotation_that_keeps_failing_loses_no_backup() {
    let temp = TempFolder::new();
    fs::write(temp.0.join("kms-agent.log.2"), "kept").unwrap();
    // A folder where the newest backup should go: the rename to it fails.
    let mut file = log_file(&temp.0, 4, 3);
    file.write(b"old\n", at(1)).unwrap();
    fs::create_dir_all(temp.0.join("kms-agent.log.1/in the way")).unwrap();
    fs::create_dir_all(temp.0.join("kms-agent.log.3/in the way")).unwrap();
    for _ in 0..3 {
        file.write(b"new\n", at(1)).unwrap_err();
    }
    assert_eq!(fs::read_to_string(temp.0.join("kms-agent.log.2")).unwrap(), "kept");
    assert_eq!(fs::read_to_string(temp.0.join(FILE_NAME)).unwrap(), "old\n", "and stays in its size");
}

#[test]
fn a_removed_folder_and_a_moved_file_are_noticed_within_a_second() {
    let temp = TempFolder::new();
    let folder = temp.0.join("a/b");
    let mut file = log_file(&folder, 1000, 1);
    file.write(b"one\n", at(1)).unwrap();
    fs::remove_dir_all(temp.0.join("a")).unwrap();
    file.write(b"two\n", at(2)).unwrap();
    assert_eq!(fs::read_to_string(folder.join(FILE_NAME)).unwrap(), "two\n");
    file.write(b"three\n", at(3)).unwrap();
    fs::rename(folder.join(FILE_NAME), folder.join("moved")).unwrap();
    file.write(b"four\n", at(3)).unwrap();
    file.write(b"five\n", at(4)).unwrap();
    assert_eq!(fs::read_to_string(folder.join("moved")).unwrap(), "two\nthree\nfour\n");
    assert_eq!(fs::read_to_string(folder.join(FILE_NAME)).unwrap(), "five\n");
}

#[test]
fn folder_and_file_are_not_for_others() {
    let temp = TempFolder::new();
    let folder = temp.0.join("logs");
    log_file(&folder, 1000, 1).open().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    // The process's umask may take more away.
    assert_eq!(mode(&folder) & !FOLDER_MODE, 0);
    assert_eq!(mode(&folder.join(FILE_NAME)) & !FILE_MODE, 0);
    assert_ne!(mode(&folder.join(FILE_NAME)) & 0o600, 0);
}

#[test]
fn a_log_that_cannot_be_created_says_what_and_why() {
    let temp = TempFolder::new();
    let in_the_way = temp.0.join("file");
    fs::write(&in_the_way, "").unwrap();
    let error = build(&settings(&in_the_way.join("logs")), false).err().unwrap();
    assert_eq!(
        error.to_string(),
        format!("LogPath {}/logs: cannot create this folder: Not a directory", in_the_way.display())
    );
    fs::create_dir(temp.0.join(FILE_NAME)).unwrap();
    let error = build(&settings(&temp.0), false).err().unwrap();
    assert_eq!(
        error.to_string(),
        format!("LogPath {}: cannot create kms-agent.log: Is a directory", temp.0.display())
    );
    let denied = LogError::File {
        path: PathBuf::from("./logs/"),
        error: io::Error::from_raw_os_error(rustix::io::Errno::ACCESS.raw_os_error()),
    };
    assert_eq!(denied.to_string(), "LogPath ./logs/: cannot create kms-agent.log: Permission denied");
}

/// Answers writes from a script, then takes everything.
#[derive(Clone, Debug, Default)]
pub(super) struct Script {
    answers: VecDeque<Result<usize, io::ErrorKind>>,
    written: Arc<Mutex<Vec<u8>>>,
}

impl Script {
    fn written(&self) -> String {
        String::from_utf8(self.written.lock().unwrap().clone()).unwrap()
    }

    fn sink(&self, journal: bool) -> Sink {
        Sink::new(Output::Script(self.clone()), journal)
    }

    /// A log of which this is the only output.
    fn log(&self, level: LevelFilter, journal: bool) -> LogHandle {
        LogHandle::new(level, Sinks { main: self.sink(journal), alarms: None, clock: Clock::start() })
    }

    pub(super) fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let taken = match self.answers.pop_front() {
            None => lines.len(),
            Some(answer) => answer?.min(lines.len()),
        };
        self.written.lock().unwrap().extend_from_slice(&lines[..taken]);
        Ok(taken)
    }
}

#[test]
fn writing_goes_on_where_it_failed() {
    use io::ErrorKind::{Interrupted, StorageFull};
    let script = Script {
        answers: [Ok(3), Err(Interrupted), Ok(2), Err(StorageFull), Err(StorageFull)].into(),
        ..Script::default()
    };
    let mut sink = script.sink(false);

    sink.put(b"first line\n");
    sink.flush(at(10));
    assert_eq!(script.written(), "first");
    assert_eq!(sink.notice.take(), Some(Notice::Failing("no storage space".to_owned())));

    sink.put(b"second\n");
    sink.flush(at(10));
    sink.flush(Mono::from_micros(10_999_999));
    assert_eq!(script.written(), "first", "no second try within the second");
    sink.flush(at(11));
    assert_eq!(sink.notice.take(), None, "said once");
    sink.flush(at(12));
    assert_eq!(script.written(), "first line\nsecond\n");
    assert_eq!(sink.notice.take(), Some(Notice::Works { lost: 0 }));
    assert!(sink.pending.is_empty());
}

#[test]
fn lines_past_the_buffer_are_dropped_whole_and_counted() {
    let script = Script { answers: [Err(io::ErrorKind::StorageFull)].into(), ..Script::default() };
    let mut sink = script.sink(false);
    let line = format!("{}\n", "x".repeat(1023));
    for n in 0..BUFFER_BYTES_MAX / 1024 + 5 {
        sink.put(line.as_bytes());
        sink.flush(at(10));
        assert_eq!(sink.lost, (n as u64 + 1).saturating_sub(BUFFER_BYTES_MAX as u64 / 1024));
    }
    // Of several lines at once each is judged by itself.
    sink.pending.truncate(BUFFER_BYTES_MAX - 1024);
    sink.put(line.repeat(3).as_bytes());
    assert_eq!((sink.lost, sink.pending.len()), (7, BUFFER_BYTES_MAX));
    sink.flush(at(11));
    assert_eq!(script.written().len(), BUFFER_BYTES_MAX);
    assert_eq!(sink.notice.take(), Some(Notice::Works { lost: 7 }));
}

#[test]
fn a_full_disk_is_survived() {
    if !Path::new("/dev/full").exists() {
        return;
    }
    let temp = TempFolder::new();
    std::os::unix::fs::symlink("/dev/full", temp.0.join(FILE_NAME)).unwrap();
    let log = build(&settings(&temp.0), false).unwrap();
    say(&log, Level::Info, OWN_TARGET, "nobody will see this");
    log.flush();
    assert_eq!(log.lost_lines(), 0, "it still waits in the buffer");
    fs::remove_file(temp.0.join(FILE_NAME)).unwrap();
    log.reopen();
    log.flush();
    let list = temp.list();
    assert!(list[0].1.ends_with("[INFO] kms_agent: nobody will see this\n"), "{list:?}");
}

#[test]
fn records_become_lines() {
    let temp = TempFolder::new();
    let log = build(&settings(&temp.0), false).unwrap();
    let other = format!("{OWN_TARGET}_other");
    let module = format!("{OWN_TARGET}::server::clients");
    for (level, target, text) in [
        (Level::Trace, OWN_TARGET, "below the level"),
        (Level::Debug, &module, "GET /v1/agent-test 200"),
        (Level::Info, OWN_TARGET, "two\nlines, \"quotes\" and \u{2028}, ünïcode"),
        (Level::Info, "rustls::client", "not ours"),
        (Level::Info, &other, "not ours"),
    ] {
        say(&log, level, target, text);
    }
    assert_eq!(temp.list(), pairs(&[(FILE_NAME, "")]), "lines wait for the flush");
    log.flush();
    // Past the timestamp.
    let lines = || -> Vec<String> {
        temp.list()[0]
            .1
            .lines()
            .map(|line| line.split_at("2026-01-31T12:34:56.789Z ".len()).1.into())
            .collect()
    };
    let mut expected = vec![
        "[DEBUG] server: GET /v1/agent-test 200",
        r#"[INFO] kms_agent: two\nlines, "quotes" and \u{2028}, ünïcode"#,
    ];
    assert_eq!(lines(), expected);
    // A warning is written at once, also one of another crate.
    say(&log, Level::Warn, "rustls::client", "odd");
    expected.push("[WARN] rustls: odd");
    assert_eq!(lines(), expected);
    // The last ones are written when the handle goes.
    say(&log, Level::Info, OWN_TARGET, "bye");
    drop(log);
    expected.push("[INFO] kms_agent: bye");
    assert_eq!(lines(), expected);
}

#[test]
fn times_are_rfc_3339_in_utc_to_the_millisecond() {
    let script = Script::default();
    let log = script.log(LevelFilter::Debug, false);
    let clock = Clock::start();
    let begun = clock.unix_ms();
    // The first of them is simplelog's own, the others take its head.
    for n in 0..50 {
        say(&log, Level::Info, OWN_TARGET, &n.to_string());
    }
    log.flush();
    let ended = clock.unix_ms();
    let format = ::time::format_description::well_known::Rfc3339;
    for (n, line) in script.written().lines().enumerate() {
        let (time, rest) = line.split_once(' ').unwrap();
        assert_eq!(rest, format!("[INFO] kms_agent: {n}"));
        let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        assert_eq!(shape, "0000-00-00T00:00:00.000Z");
        let nanos = ::time::OffsetDateTime::parse(time, &format).unwrap().unix_timestamp_nanos();
        let unix_ms = u64::try_from(nanos / 1_000_000).unwrap();
        assert!((begun..=ended).contains(&unix_ms), "{begun} {line} {ended}");
    }
    assert_eq!(script.written().lines().count(), 50);
}

#[test]
fn a_head_is_for_its_second_level_and_target() {
    let mut head = Head::none();
    let mut out = Vec::new();
    assert!(!head.put(&mut out, 0, Level::Info, "cli"));
    let bytes = b"2026-01-31T12:34:56.789Z [INFO] server: ";
    head.learn(bytes, 1_769_862_896_789, Level::Info, "server");
    for (unix_ms, level, target) in [
        (1_769_862_895_999, Level::Info, "server"),
        (1_769_862_897_000, Level::Info, "server"),
        (1_769_862_896_789, Level::Warn, "server"),
        (1_769_862_896_789, Level::Info, "serve"),
    ] {
        assert!(!head.put(&mut out, unix_ms, level, target), "{unix_ms} {level} {target}");
    }
    assert!(out.is_empty());
    for unix_ms in [1_769_862_896_000, 1_769_862_896_070, 1_769_862_896_999] {
        assert!(head.put(&mut out, unix_ms, Level::Info, "server"));
    }
    let expected =
        ["56.000Z", "56.070Z", "56.999Z"].map(|it| format!("2026-01-31T12:34:{it} [INFO] server: "));
    assert_eq!(String::from_utf8(out).unwrap(), expected.concat());
}

#[test]
fn to_the_journal_goes_the_priority_and_no_time() {
    let script = Script::default();
    let log = script.log(LevelFilter::Debug, true);
    for level in [Level::Error, Level::Warn, Level::Info, Level::Debug] {
        say(&log, level, OWN_TARGET, "x");
    }
    log.flush();
    let expected = "<3>[ERROR] kms_agent: x\n<4>[WARN] kms_agent: x\n<6>[INFO] kms_agent: x\n\
                    <7>[DEBUG] kms_agent: x\n";
    assert_eq!(script.written(), expected);
}

#[test]
fn with_a_file_warnings_go_to_standard_error_too() {
    let (file, stderr) = (Script::default(), Script::default());
    let sinks = Sinks { main: file.sink(true), alarms: Some(stderr.sink(true)), clock: Clock::start() };
    let log = LogHandle::new(LevelFilter::Info, sinks);
    for level in [Level::Info, Level::Error, Level::Warn, Level::Info, Level::Debug] {
        say(&log, level, OWN_TARGET, "[ERROR] x");
    }
    log.flush();
    let (error, warning) = ("<3>[ERROR] kms_agent: [ERROR] x\n", "<4>[WARN] kms_agent: [ERROR] x\n");
    let info = "<6>[INFO] kms_agent: [ERROR] x\n";
    assert_eq!(file.written(), [info, error, warning, info].concat());
    assert_eq!(stderr.written(), [error, warning].concat());
}

#[test]
fn an_endless_record_is_cut() {
    let script = Script::default();
    let log = script.log(LevelFilter::Info, true);
    for text in ["x".repeat(RECORD_BYTES_MAX), "x".repeat(RECORD_BYTES_MAX + 1), "\0ü".repeat(100_000)] {
        say(&log, Level::Warn, OWN_TARGET, &text);
    }
    let longest = RECORD_BYTES_MAX + "<4>[WARN] kms_agent: ".len() + ELLIPSIS.len_utf8();
    let written = script.written();
    let cut: Vec<_> = written.lines().map(|line| (line.len() <= longest, line.ends_with('…'))).collect();
    assert_eq!(cut, [(true, false), (true, true), (true, true)]);
}

#[test]
fn a_value_that_cannot_be_displayed_costs_no_line() {
    struct Broken;
    impl Display for Broken {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("half")?;
            Err(fmt::Error)
        }
    }
    let script = Script::default();
    let log = script.log(LevelFilter::Info, true);
    for args in [format_args!("{Broken} of it"), format_args!("all of it")] {
        log.logger.log(&Record::builder().target(OWN_TARGET).args(args).build());
    }
    log.flush();
    assert_eq!(script.written(), "<6>[INFO] kms_agent: half\n<6>[INFO] kms_agent: all of it\n");
}

#[test]
fn reopening_follows_a_moved_file() {
    let temp = TempFolder::new();
    let log = build(&settings(&temp.0), false).unwrap();
    say(&log, Level::Info, OWN_TARGET, "one");
    log.flush();
    fs::rename(temp.0.join(FILE_NAME), temp.0.join("moved")).unwrap();
    log.reopen();
    say(&log, Level::Info, OWN_TARGET, "two");
    log.flush();
    let list = temp.list();
    assert!(list[0].1.ends_with(" two\n") && list[1].1.ends_with(" one\n"), "{list:?}");
}

#[test]
fn rate_limit_lets_a_burst_through_and_then_so_many_a_second() {
    let mut limit = RateLimit::new(10, 3);
    let mut seen = Vec::new();
    for ms in (0..=400).step_by(10) {
        if let Some(left_out) = limit.admit(Mono::from_micros(ms * 1000)) {
            seen.push((ms, left_out.0));
        }
    }
    // 3 at once, then one each 100 ms, with the 9 between them counted.
    assert_eq!(seen, [(0, 0), (10, 0), (20, 0), (100, 7), (200, 9), (300, 9), (400, 9)]);
    // After a pause the burst is whole again, and no larger.
    let burst = (0..5).filter_map(|_| limit.admit(at(100))).map(|left_out| left_out.0);
    assert_eq!(burst.collect::<Vec<_>>(), [0, 0, 0]);
    assert_eq!(limit.admit(at(200)), Some(LeftOut(2)));
}

#[test]
fn rate_limit_survives_odd_numbers() {
    for (per_second, burst) in [(0, 0), (1, 0), (0, u32::MAX), (u32::MAX, u32::MAX)] {
        let mut limit = RateLimit::new(per_second, burst);
        assert_eq!(limit.admit(at(5)), Some(LeftOut(0)), "{per_second} {burst}");
        assert!(limit.admit(Mono::NEVER).is_some());
        // Time that runs backwards holds records back at worst.
        let _ = limit.admit(at(0));
    }
}

#[test]
fn left_out_is_said_only_if_something_was() {
    assert_eq!(LeftOut(0).to_string(), "");
    assert_eq!(LeftOut(312).to_string(), " (312 like it left out)");
}

#[test]
fn escape_makes_text_safe() {
    for (text, expected) in [
        ("agent-test", "agent-test"),
        ("", ""),
        ("geheim ö 秘密", "geheim ö 秘密"),
        ("a\nb\r\tc\0", r"a\nb\r\tc\0"),
        (r#"say "hi" \o/"#, r#"say \"hi\" \\o/"#),
        ("\u{1b}[31m", r"\u{1b}[31m"),
        ("\u{85}\u{2028}\u{202e}\u{200b}\u{feff}", r"\u{85}\u{2028}\u{202e}\u{200b}\u{feff}"),
    ] {
        assert_eq!(escape(text).to_string(), expected);
    }
    let longest = "é".repeat(ESCAPE_CHARS_MAX);
    assert_eq!(escape(&longest).to_string(), longest);
    assert_eq!(escape(&format!("{longest}é")).to_string(), format!("{longest}…"));
}
