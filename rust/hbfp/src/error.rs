//! The one error type of the crate. Every variant says what was expected and what was found.

use std::fmt;

/// Result of a fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call was refused. Nothing has been written to an output when one is returned, unless its text says so.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A block format is outside the contract or its written form can't be read.
    Format {
        /// What a valid description looks like.
        expected: String,
        /// What was given.
        found: String,
    },
    /// Sizes or block boundaries do not fit together.
    Shape {
        /// The relation that should hold.
        expected: String,
        /// The sizes that were given.
        found: String,
    },
    /// A value that is not finite, where the caller asked for a check.
    NonFinite {
        /// Flat logical index of the first such value.
        index: usize,
        /// Its f32 bit pattern.
        bits: u32,
    },
    /// Planes that no encoder produces: a forbidden code, padding that is not zero, codes under a NaN exponent.
    Code {
        /// The rule that was broken.
        expected: String,
        /// Where, and what stands there.
        found: String,
    },
    /// A CPU level that was asked for and can't run here.
    Level {
        /// The levels that can run.
        expected: String,
        /// The level asked for.
        found: String,
    },
}

impl Error {
    pub(crate) fn format(expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Format { expected: expected.into(), found: found.into() }
    }
    pub(crate) fn shape(expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Shape { expected: expected.into(), found: found.into() }
    }
    pub(crate) fn code(expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Code { expected: expected.into(), found: found.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Format { expected, found }
            | Self::Shape { expected, found }
            | Self::Code { expected, found }
            | Self::Level { expected, found } => write!(f, "expected {expected}; found {found}"),
            Self::NonFinite { index, bits } => write!(
                f,
                "expected finite values; found {} (bits {bits:#010x}) at flat index {index}: remove it, or encode \
                 without check, which makes its block a NaN block",
                f32::from_bits(*bits)
            ),
        }
    }
}

impl std::error::Error for Error {}
