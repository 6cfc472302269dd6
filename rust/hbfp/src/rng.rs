//! Philox4x32-10, the counter-based generator of stochastic rounding (Salmon, Moraes, Dror and Shaw, *Parallel random
//! numbers: as easy as 1, 2, 3*, SC 2011).

/// Multiplier of counter words 0 and 2.
pub const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// What each round adds to the key.
pub const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
/// Rounds.
pub const ROUNDS: usize = 10;

/// The four output words of one counter.
#[must_use]
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..ROUNDS {
        let p0 = u64::from(MULTIPLIERS[0]) * u64::from(c0);
        let p1 = u64::from(MULTIPLIERS[1]) * u64::from(c2);
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [c0, c1, c2, c3]
}

/// Where random bits come from: the key, and the stream that separates uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seed {
    /// Key, low word first.
    pub seed: u64,
    /// Counter words 2 and 3, low word first.
    pub stream: u64,
}

impl Seed {
    /// The 16 random bits of column `column` of row `row`.
    #[must_use]
    pub fn bits(&self, row: u32, column: usize) -> u16 {
        let counter = [(column / 8) as u32, row, self.stream as u32, (self.stream >> 32) as u32];
        let words = philox4x32(counter, [self.seed as u32, (self.seed >> 32) as u32]);
        (words[column % 8 / 2] >> (16 * (column % 2))) as u16
    }
}

#[cfg(test)]
mod tests {
    use super::philox4x32;

    #[test]
    fn published_known_answers() {
        // Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds.
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, answer) in cases {
            assert_eq!(philox4x32(counter, key), answer);
        }
    }
}
