//! For tests of this crate and of crates built on it: fill patterns and buffers whose borders are watched.

pub use crate::arch::kernels::models;

/// Small reproducible generator for test data (SplitMix64, Steele, Lea and Flood 2014).
#[derive(Clone, Debug)]
pub struct TestRng(pub u64);

impl TestRng {
    /// Next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    /// An integer below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next_u64() % n as u64) as usize
    }
}

/// What test data looks like; each variant hunts a bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// About normal, all of one magnitude: the common case.
    Plain,
    /// Magnitudes over 40 binades, zeros, negative zeros and blocks of zeros: exponents and their ties.
    Wide,
    /// Multiples of a half and exact powers of two: ties and saturation.
    Ties,
    /// Subnormals and the largest finite values: clamping, overflow, the general path.
    Extreme,
    /// `Plain` with a NaN, not the canonical one, and an infinity.
    NonFinite,
}

impl Fill {
    /// All patterns.
    pub const ALL: [Self; 5] = [Self::Plain, Self::Wide, Self::Ties, Self::Extreme, Self::NonFinite];

    /// `n` values.
    #[must_use]
    pub fn values(self, n: usize, seed: u64) -> Vec<f32> {
        let mut rng = TestRng(seed);
        let plain = |rng: &mut TestRng| {
            let sum: i64 = (0..4).map(|_| (rng.next_u64() >> 40) as i64 - (1 << 23)).sum();
            sum as f32 / (1 << 24) as f32
        };
        let mut out: Vec<f32> = (0..n)
            .map(|_| match self {
                Self::Plain | Self::NonFinite => plain(&mut rng),
                Self::Wide => match rng.below(8) {
                    0 => 0.0,
                    1 => -0.0,
                    _ => plain(&mut rng) * 2f32.powi(rng.below(40) as i32 - 20),
                },
                Self::Ties => match rng.below(3) {
                    0 => 2f32.powi(rng.below(9) as i32 - 4),
                    _ => (rng.below(64) as f32 - 32.0) / 4.0,
                },
                Self::Extreme => match rng.below(4) {
                    0 => f32::from_bits(rng.next_u64() as u32 & 0x807F_FFFF),
                    1 => f32::MAX * if rng.below(2) == 0 { 1.0 } else { -0.75 },
                    2 => plain(&mut rng) * 2f32.powi(-100),
                    _ => plain(&mut rng),
                },
            })
            .collect();
        match self {
            Self::Wide => {
                for start in (0..n).step_by(96) {
                    out[start..(start + 32).min(n)].fill(0.0);
                }
            }
            // Whole stretches at one end of the range, so that blocks keep it.
            Self::Extreme => {
                for start in (0..n).step_by(160) {
                    for x in &mut out[start..(start + 80).min(n)] {
                        *x = f32::from_bits(x.to_bits() & 0x80FF_FFFF);
                    }
                }
            }
            Self::NonFinite if n > 0 => {
                out[n / 3] = f32::from_bits(0xFFC1_2345);
                out[n / 2] = f32::NEG_INFINITY;
            }
            _ => {}
        }
        out
    }
}

/// A buffer with bands on both sides that must keep their pattern.
#[derive(Clone, Debug)]
pub struct Guarded {
    data: Vec<f32>,
    len: usize,
}

impl Guarded {
    const BAND: usize = 64;
    const PATTERN: u32 = 0xDEAD_BEEF;

    /// `len` elements of `value` between two bands.
    #[must_use]
    pub fn new(len: usize, value: f32) -> Self {
        let mut data = vec![f32::from_bits(Self::PATTERN); len + 2 * Self::BAND];
        data[Self::BAND..Self::BAND + len].fill(value);
        Self { data, len }
    }
    /// The elements.
    pub fn elements(&mut self) -> &mut [f32] {
        &mut self.data[Self::BAND..Self::BAND + self.len]
    }
    /// The elements, once both bands were found untouched.
    ///
    /// # Panics
    /// If something wrote to a band.
    #[must_use]
    pub fn checked(&self) -> &[f32] {
        let (front, rest) = self.data.split_at(Self::BAND);
        let (data, back) = rest.split_at(self.len);
        for band in [front, back] {
            assert!(band.iter().all(|x| x.to_bits() == Self::PATTERN), "a write outside the buffer");
        }
        data
    }
}

/// Kernels of all levels this machine can run, and the models of those it can't: `(name, kernels)`.
#[must_use]
pub fn all_kernels() -> Vec<(&'static str, &'static crate::Kernels)> {
    let mut out: Vec<_> = crate::Level::ALL
        .into_iter()
        .filter(|level| level.is_available())
        .map(|level| (level.name(), crate::Kernels::of(level)))
        .collect();
    out.extend([
        ("model of avx2", models::avx2()),
        ("model of avx512vnni", models::avx512vnni()),
        ("model of amx", models::amx()),
    ]);
    for level in crate::Level::ALL.into_iter().filter(|level| !level.is_available()) {
        eprintln!("NOT RUN on this machine: level {level}");
    }
    out
}
