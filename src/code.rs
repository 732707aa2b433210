//! The `Code`s of failures that originate in the agent, as `docs/contract.md`, sections 3 and 4, has them. KMS's own
//! codes are text, passed on as they come.

use std::fmt;

/// An enum of all codes, each with its status and whether a gate gives it.
macro_rules! codes {
    ($($code:ident: $status:literal, at_gate: $at_gate:literal;)*) => {
        /// Why the agent itself, and not KMS, refuses or fails a request.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[expect(missing_docs, reason = "docs/contract.md, sections 3 and 4, explains them")]
        pub enum Code { $($code,)* }

        impl Code {
            /// All of them, in their order.
            pub(crate) const ALL: &[Code] = &[$(Code::$code,)*];

            /// As replies, the log and the label `result` of metrics have it.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Code::$code => stringify!($code),)* }
            }

            /// The HTTP status that goes with it.
            pub(crate) const fn status(self) -> u16 {
                match self { $(Code::$code => $status,)* }
            }

            /// Whether it says that the request itself was refused, before anything was asked for.
            pub(crate) const fn is_at_gate(self) -> bool {
                match self { $(Code::$code => $at_gate,)* }
            }
        }
    };
}

codes! {
    UpstreamTimeout: 504, at_gate: false;
    UpstreamUnreachable: 502, at_gate: false;
    UpstreamInvalidResponse: 502, at_gate: false;
    CredentialUnavailable: 503, at_gate: false;
    ServiceUnavailable: 503, at_gate: false;
    InvalidRequest: 400, at_gate: true;
    RequestHeaderTooLarge: 431, at_gate: true;
    UriTooLong: 414, at_gate: true;
    ConnectionLimitExceeded: 429, at_gate: true;
    ForbiddenHost: 403, at_gate: true;
    Forwarded: 400, at_gate: true;
    InvalidToken: 403, at_gate: true;
    MethodNotAllowed: 405, at_gate: true;
    NotFound: 404, at_gate: true;
    InvalidParameter: 400, at_gate: true;
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}
