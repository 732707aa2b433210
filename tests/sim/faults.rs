//! What can go wrong, how often it does in one run, and how often it did.

use super::rng::Rng;

macro_rules! faults {
    ($($name:ident),* $(,)?) => {
        /// A kind of fault, or of ordinary trouble that has to happen somewhere in a sweep.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Fault { $($name),* }

        impl Fault {
            pub const ALL: &[Fault] = &[$(Fault::$name),*];
        }
    };
}

faults! {
    // The kernel.
    PartialRead, PartialWrite, WriteBlocked, WriteBlockedAnyway, Interrupted, SpuriousReadiness, SpuriousWakeUp,
    LateWakeUp, WithheldReadiness, SplitReadiness, FullReadiness, ShuffledBatch, StaleEvent, SlotReused, Stall,
    AcceptWithoutDescriptor, AcceptAborted, ConnectWithoutDescriptor, WallClockForward, WallClockBack,
    // The network.
    ConnectUnreachable, ConnectRefused, ConnectHangs, ConnectSlow, UpstreamReset, ResetBeforeAccept,
    NameUnknown, NameWithoutAddress, NameSlow, AddressDead,
    // KMS.
    KmsSlow, KmsHangs, KmsFails, KmsFailsInHtml, KmsThrottles, KmsRefusesCredentials, KmsRefusesClock,
    KmsRefusesSignature, KmsQuotesToken, KmsAnswersForAnother, KmsCutsBody, KmsGarbage, KmsCutsJson, KmsTooLarge,
    KmsDropsMidReply, KmsDropsBeforeReply, KmsResetsMidReply, KmsTrickles, KmsClosesIdle, KmsTalksFirst,
    KmsSaysMore, KmsChunked, KmsUntilClose, KmsInterim, KmsSaysClose, KmsLarge,
    SecretRotated, SecretDeleted, SecretRestored,
    // The metadata service.
    MetadataSlow, MetadataHangs, MetadataFails, MetadataGarbage, MetadataPlain, MetadataRefusesToken, MetadataNoRole,
    MetadataExpired, MetadataShortLife, MetadataDrops,
    // The process.
    Terminated, Reloaded, TokenChanged,
    // Clients.
    ClientSteady, ClientPipelines, ClientTrickles, ClientSilent, ClientVanishes, ClientHalfCloses, ClientNeverReads,
    ClientReadsSlowly, ClientGarbage, ClientWrongToken, ClientOldToken, ClientRefreshes, ClientsBurst,
    // What they lead to.
    HeadDeadline, FirstByteDeadline, IdleDeadline, WriteDeadline, LingerDeadline, Refused429, ServedStale, ServedHit,
    ServedRefresh, ServedMiss, RememberedRefusal, ResponseAws, ResponseVault,
}

/// How often each kind was hit.
#[derive(Clone)]
pub struct Hits(pub [u64; Fault::ALL.len()]);

impl Default for Hits {
    fn default() -> Hits {
        Hits([0; Fault::ALL.len()])
    }
}

impl Hits {
    pub fn add(&mut self, other: &Hits) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }

    pub fn of(&self, fault: Fault) -> u64 {
        self.0[fault as usize]
    }
}

/// How likely each kind is in one run: most are off, so that every run has a character of its own.
pub struct Plan {
    per_mille: [u64; Fault::ALL.len()],
    /// Nothing at all goes wrong.
    pub calm: bool,
}

impl Plan {
    pub fn random(rng: &mut Rng) -> Plan {
        let calm = rng.chance(60);
        let share = rng.pick(&[100, 300, 600]);
        let mut per_mille = [0; Fault::ALL.len()];
        for rate in &mut per_mille {
            if !calm && rng.chance(share) {
                *rate = rng.pick(&[3, 20, 60, 250]);
            }
        }
        Plan { per_mille, calm }
    }

    pub fn rate(&self, fault: Fault) -> u64 {
        if self.calm { 0 } else { self.per_mille[fault as usize] }
    }

    /// Everything ends well from now on.
    pub fn end(&mut self) {
        self.calm = true;
    }
}
