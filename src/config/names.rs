//! The sections and keys that there are, and which of them an unknown name was meant to be.

/// From this likeness on (0 to 1) a known name is taken for what an unknown one was meant to be.
const LIKENESS_MIN: f64 = 0.6;
/// Names longer than that (bytes) are not compared with the known ones.
const COMPARED_BYTES_MAX: usize = 64;

/// Every section with its keys.
pub(super) const SECTIONS: [(&str, &[&str]); 4] = [
    (
        "Server",
        &[
            "HttpPort",
            "SSRFHeaders",
            "SSRFEnvVariables",
            "PathPrefix",
            "MaxConn",
            "ResponseType",
            "IgnoreTransientErrors",
            "AllowedHosts",
        ],
    ),
    ("Cache", &["CacheSize", "CacheBytes", "TTLSeconds", "MaxStaleSeconds"]),
    ("KMS", &["Region", "Endpoint", "AuthType", "RoleName", "AapArn", "CaFile", "MetadataEndpoint"]),
    ("Log", &["LogLevel", "LogPath", "LogFileSizeMB", "LogBackupFiles"]),
];

/// `true` for the name of a section or key.
pub(super) fn is_known(name: &str) -> bool {
    SECTIONS.iter().any(|(section, keys)| *section == name || keys.contains(&name))
}

/// How alike two names are, from 0 to 1. Case and marks between words do not count.
fn likeness(name: &str, known: &str) -> f64 {
    if name.len() > COMPARED_BYTES_MAX {
        return 0.0;
    }
    let plain = |name: &str| -> String {
        name.chars().filter(|c| !matches!(c, '_' | '-' | ' ')).map(|c| c.to_ascii_lowercase()).collect()
    };
    strsim::normalized_damerau_levenshtein(&plain(name), &plain(known))
}

/// The candidate most like `name`, the first of several, if it is alike enough to be meant.
fn nearest<T>(name: &str, candidates: impl Iterator<Item = (T, &'static str)>) -> Option<(T, &'static str)> {
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
        (None, Some((section, keys))) => format!("the keys of [{section}] are {}", keys.join(", ")),
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

fn sections() -> String {
    let names: Vec<_> = SECTIONS.iter().map(|(section, _)| format!("[{section}]")).collect();
    format!("the sections are {}", names.join(", "))
}
