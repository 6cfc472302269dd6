//! Block formats: which elements share an exponent, how wide the mantissas are, how the exponent is chosen.
//!
//! A block stores integers `q` in −Q…Q, Q = 2^(m−1) − 1, and one byte `c = s + 127`; an element's value is q·2^s.
//! `c = 255` marks a NaN block. This module only describes; it uses nothing but [`crate::error`].

use crate::error::{Error, Result};
use std::{fmt, str::FromStr};

/// Byte of a NaN block.
pub const NAN_EXPONENT: u8 = 255;
/// `c = s + EXPONENT_OFFSET`.
pub const EXPONENT_OFFSET: i32 = 127;
/// Bits of the NaN that every implementation produces.
pub const CANONICAL_NAN: f32 = f32::from_bits(0x7FC0_0000);
/// Largest block along a line, and largest number of elements of a tile.
pub const MAX_BLOCK: usize = 1024;
/// Largest side of a square tile.
pub const MAX_TILE: usize = 32;

/// Which elements share an exponent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BlockShape {
    /// This many consecutive elements along one axis; the last block of a line may be short.
    Line(usize),
    /// Square tiles of the last two dimensions with sides of this length.
    Tile(usize),
    /// All elements of the tensor.
    Tensor,
}

/// How the exponent follows from the largest magnitude of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExponentRule {
    /// E = floor(log2 amax) + 1. Encoding is idempotent under it.
    MaxExponent,
    /// E = ceil(log2 amax), the published emulators' rule: an exact power of two saturates.
    Ceil,
    /// The smallest E for which rounding amax to nearest does not saturate.
    NoClip,
}

/// How a scaled value becomes an integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Rounding {
    /// To nearest, ties to even.
    NearestEven = 0,
    /// To nearest, ties away from zero.
    NearestAway = 1,
    /// Towards zero.
    TowardZero = 2,
    /// Up with the probability of the fraction's first 16 bits, from Philox4x32-10.
    Stochastic = 3,
}

impl Rounding {
    /// The rounding with this number.
    ///
    /// # Errors
    /// [`Error::Format`] when there is none.
    pub fn from_code(code: u8) -> Result<Self> {
        [Self::NearestEven, Self::NearestAway, Self::TowardZero, Self::Stochastic]
            .get(usize::from(code))
            .copied()
            .ok_or_else(|| Error::format("a rounding 0…3", code.to_string()))
    }
}

/// A validated description of a block format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockFormat {
    bits: u8,
    shape: BlockShape,
    rule: ExponentRule,
    exponent_bits: u8,
    exponent_bias: i32,
}

impl BlockFormat {
    /// Describes `bits`-wide mantissas (sign included) in blocks of `shape`, exponents of 8 bits by `MaxExponent`.
    ///
    /// # Errors
    /// [`Error::Format`] for widths outside 2…16, blocks outside 1…1024 and tiles outside 1…32.
    pub fn new(bits: u8, shape: BlockShape) -> Result<Self> {
        if !(2..=16).contains(&bits) {
            return Err(Error::format("a mantissa width of 2…16 bits, sign included", bits.to_string()));
        }
        match shape {
            BlockShape::Line(n) if !(1..=MAX_BLOCK).contains(&n) => {
                return Err(Error::format("a block of 1…1024 elements, or None for the whole tensor", n.to_string()));
            }
            BlockShape::Tile(t) if !(1..=MAX_TILE).contains(&t) => {
                return Err(Error::format("a tile side of 1…32", t.to_string()));
            }
            _ => {}
        }
        Ok(Self { bits, shape, rule: ExponentRule::MaxExponent, exponent_bits: 8, exponent_bias: 127 })
    }

    /// The same format under another exponent rule.
    #[must_use]
    pub fn with_rule(self, rule: ExponentRule) -> Self {
        Self { rule, ..self }
    }

    /// The same format with exponents of `width` bits: s is clamped to −bias … 2^width − 2 − bias. No `bias` means
    /// 2^(width−1) − 1.
    ///
    /// # Errors
    /// [`Error::Format`] for a width outside 2…8 and a range that shares no exponent with −127…127.
    pub fn with_exponent(self, width: u8, bias: Option<i32>) -> Result<Self> {
        if !(2..=8).contains(&width) {
            return Err(Error::format("an exponent width of 2…8 bits", width.to_string()));
        }
        let bias = bias.unwrap_or((1 << (width - 1)) - 1);
        let format = Self { exponent_bits: width, exponent_bias: bias, ..self };
        if !(-512..=512).contains(&bias) || format.min_scale() > format.max_scale() {
            let found = format!("bias {bias} with {width} exponent bits");
            return Err(Error::format("an exponent range that meets −127…127", found));
        }
        Ok(format)
    }

    /// Mantissa width m, sign included.
    #[must_use]
    pub fn bits(&self) -> u8 {
        self.bits
    }
    /// Which elements share an exponent.
    #[must_use]
    pub fn shape(&self) -> BlockShape {
        self.shape
    }
    /// How exponents are chosen.
    #[must_use]
    pub fn rule(&self) -> ExponentRule {
        self.rule
    }
    /// Exponent width in bits.
    #[must_use]
    pub fn exponent_bits(&self) -> u8 {
        self.exponent_bits
    }
    /// Exponent bias.
    #[must_use]
    pub fn exponent_bias(&self) -> i32 {
        self.exponent_bias
    }
    /// Largest code Q = 2^(m−1) − 1.
    #[must_use]
    pub fn max_code(&self) -> i32 {
        (1 << (self.bits - 1)) - 1
    }
    /// Smallest scale exponent s.
    #[must_use]
    pub fn min_scale(&self) -> i32 {
        (-self.exponent_bias).max(-127)
    }
    /// Largest scale exponent s.
    #[must_use]
    pub fn max_scale(&self) -> i32 {
        ((1 << self.exponent_bits) - 2 - self.exponent_bias).min(127)
    }

    /// Exponent byte c of a block whose largest magnitude has the f32 bits `amax` (sign bit clear).
    #[inline]
    #[must_use]
    pub fn exponent_code(&self, amax: u32) -> u8 {
        if amax == 0 {
            return 0;
        }
        if amax >= 0x7F80_0000 {
            return NAN_EXPONENT;
        }
        // floor(log2 amax) and the 23 fraction bits below the leading one, also for subnormals.
        let lead = 31 - amax.leading_zeros() as i32;
        let (log2, fraction) = if lead >= 23 {
            ((amax >> 23) as i32 - 127, amax & 0x7F_FFFF)
        } else {
            (lead - 149, (amax << (23 - lead)) & 0x7F_FFFF)
        };
        let exponent = match self.rule {
            ExponentRule::MaxExponent => log2 + 1,
            ExponentRule::Ceil => log2 + i32::from(fraction != 0),
            // Rounds up to 2^(m−1) from 2^(m−1) − 1/2 on: when the first m − 1 fraction bits are all ones.
            ExponentRule::NoClip => log2 + 1 + i32::from(fraction >= (1 << 23) - (1 << (24 - u32::from(self.bits)))),
        };
        let scale = (exponent - (i32::from(self.bits) - 1)).clamp(self.min_scale(), self.max_scale());
        (scale + EXPONENT_OFFSET) as u8
    }

    /// For normal `amax` the exponent is floor(log2) of its bits after adding the first number, plus the second: what
    /// [`Self::exponent_code`] decides by comparisons, as one addition that carries into the exponent field.
    pub(crate) fn exponent_carry(&self) -> (i32, i32) {
        match self.rule {
            ExponentRule::MaxExponent => (0, 1),
            ExponentRule::Ceil => (0x7F_FFFF, 0),
            ExponentRule::NoClip => (1 << (24 - i32::from(self.bits)), 1),
        }
    }

    /// Smallest and largest scale exponent.
    pub(crate) fn scale_range(&self) -> [i32; 2] {
        [self.min_scale(), self.max_scale()]
    }

    /// Whether encoders write the kernels' panels straight from f32. They clamp codes and not values, four times as many at
    /// a time, and every rounding gives the same then; it takes magnitudes below 2^15 steps, so no block may want a larger
    /// scale than the exponents can say.
    #[must_use]
    pub fn encodes_to_panels(&self) -> bool {
        self.bits() <= 8 && matches!(self.shape, BlockShape::Line(_)) && self.scale_range()[1] == 127
    }

    /// Length of the blocks along a reduction of `k` elements when this format takes part in a product.
    #[must_use]
    pub fn block_along(&self, k: usize) -> usize {
        match self.shape {
            BlockShape::Line(n) | BlockShape::Tile(n) => n.min(k.max(1)),
            BlockShape::Tensor => k.max(1),
        }
    }
}

/// 2^e as f32 for −149 ≤ e ≤ 127, subnormal below −126.
#[inline]
#[must_use]
pub fn power_of_two(e: i32) -> f32 {
    debug_assert!((-149..=127).contains(&e));
    f32::from_bits(if e >= -126 { ((e + 127) as u32) << 23 } else { 1 << (e + 149) })
}

impl fmt::Display for BlockFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hbfp{}", self.bits)?;
        match self.shape {
            BlockShape::Line(n) => write!(f, "b{n}")?,
            BlockShape::Tile(t) => write!(f, "t{t}")?,
            BlockShape::Tensor => write!(f, "tensor")?,
        }
        match self.rule {
            ExponentRule::MaxExponent => {}
            ExponentRule::Ceil => write!(f, "-ceil")?,
            ExponentRule::NoClip => write!(f, "-noclip")?,
        }
        let default_bias = (1 << (self.exponent_bits - 1)) - 1;
        if self.exponent_bits != 8 || self.exponent_bias != default_bias {
            write!(f, "-e{}", self.exponent_bits)?;
        }
        if self.exponent_bias != default_bias {
            write!(f, "-bias{}", self.exponent_bias)?;
        }
        Ok(())
    }
}

impl FromStr for BlockFormat {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = || {
            let expected = "a format such as hbfp4b64, hbfp6b16-noclip-e5, hbfp4t8 or hbfp4tensor";
            Error::format(expected, format!("{text:?}"))
        };
        // Plain decimal digits only: no sign, no leading zero, so that every format has one written form.
        fn number<T: FromStr + fmt::Display>(digits: &str) -> Option<T> {
            digits.parse::<T>().ok().filter(|n| n.to_string() == digits)
        }
        let mut parts = text.split('-');
        let head = parts.next().and_then(|p| p.strip_prefix("hbfp")).ok_or_else(bad)?;
        let split = head.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let (digits, shape) = head.split_at(split);
        let bits = number::<u8>(digits).ok_or_else(bad)?;
        let shape = if shape == "tensor" {
            BlockShape::Tensor
        } else if let Some(n) = shape.strip_prefix('b') {
            BlockShape::Line(number(n).ok_or_else(bad)?)
        } else {
            BlockShape::Tile(shape.strip_prefix('t').and_then(number).ok_or_else(bad)?)
        };
        let mut format = Self::new(bits, shape)?;
        let mut rest: Vec<&str> = parts.collect();
        // "-bias-3" splits at its minus sign.
        if let [.., bias, negative] = rest[..]
            && bias == "bias"
            && negative.bytes().all(|b| b.is_ascii_digit())
        {
            let start = text.len() - negative.len() - "bias-".len();
            rest.truncate(rest.len() - 2);
            rest.push(&text[start..]);
        }
        let mut rest = rest.into_iter().peekable();
        if let Some(rule) = rest.next_if(|p| *p == "ceil" || *p == "noclip") {
            format = format.with_rule(if rule == "ceil" { ExponentRule::Ceil } else { ExponentRule::NoClip });
        }
        let width = rest.next_if(|p| p.starts_with('e')).map(|p| number::<u8>(&p[1..]).ok_or_else(bad)).transpose()?;
        let bias =
            rest.next_if(|p| p.starts_with("bias")).map(|p| number::<i32>(&p[4..]).ok_or_else(bad)).transpose()?;
        if let Some(width) = width {
            format = format.with_exponent(width, bias)?;
        } else if bias.is_some() {
            return Err(bad());
        }
        if rest.next().is_some() || format.to_string() != text {
            return Err(bad());
        }
        Ok(format)
    }
}
