//! CPU levels: what they are called and whether this machine has them.

use crate::error::{Error, Result};
use std::{fmt, str::FromStr};

/// A set of kernels that a CPU can run. All levels compute the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Level {
    /// Plain Rust, every architecture.
    Scalar,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
    Avx512Vnni,
    /// The same with AMX: a matrix unit for 8-bit integers. Linux, which must let the process use it.
    Amx,
}

impl Level {
    /// All levels, narrowest first.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Avx2, Self::Avx512Vnni, Self::Amx];

    /// Whether this CPU can run the level.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Vnni.is_available() && super::x86_64::amx::is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512Vnni | Self::Amx => false,
        }
    }

    /// The widest level this CPU can run.
    #[must_use]
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|level| level.is_available()).unwrap_or(Self::Scalar)
    }

    /// The level's name, as `HBFP_LEVEL` takes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512Vnni => "avx512vnni",
            Self::Amx => "amx",
        }
    }

    /// The level called `text`, if this CPU can run it.
    ///
    /// # Errors
    /// [`Error::Level`] for an unknown name and for a level that this CPU lacks.
    pub fn request(text: &str) -> Result<Self> {
        let level: Self = text.parse()?;
        if level.is_available() {
            return Ok(level);
        }
        let available: Vec<_> = Self::ALL.into_iter().filter(|l| l.is_available()).map(Self::name).collect();
        let expected = format!("a level that this CPU can run ({})", available.join(", "));
        Err(Error::Level { expected, found: format!("{text}, whose instructions it lacks") })
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Level {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|level| level.name() == text).ok_or_else(|| Error::Level {
            expected: format!("a level ({})", Self::ALL.map(Self::name).join(", ")),
            found: format!("{text:?}"),
        })
    }
}
