//! Codes as bit streams.
//!
//! A block of n codes of m bits takes ⌈n·m / 8⌉ bytes: two's complement, least significant bit first, padded with zero
//! bits.
//! ```text
//! m = 4   byte 0 = code 1 | code 0                      (low nibble first)
//! m = 6   byte 0 = code 1 [1:0] | code 0 [5:0], byte 1 = code 2 [3:0] | code 1 [5:2], byte 2 = code 3 [5:0] | code 2 [5:4]
//! ```

/// Bytes of `n` codes of `bits` bits.
#[inline]
#[must_use]
pub fn packed_bytes(n: usize, bits: u8) -> usize {
    // n / 8 groups of `bits` bytes, without overflow for n near the limit.
    n / 8 * usize::from(bits) + (n % 8 * usize::from(bits)).div_ceil(8)
}

/// An integer that holds codes: i8 up to 8 bits, i16 up to 16.
pub(crate) trait Code: Copy + Default {
    fn from_i16(code: i16) -> Self;
    fn to_i16(self) -> i16;
}
impl Code for i8 {
    #[inline(always)]
    fn from_i16(code: i16) -> Self {
        code as Self
    }
    #[inline(always)]
    fn to_i16(self) -> i16 {
        i16::from(self)
    }
}
impl Code for i16 {
    #[inline(always)]
    fn from_i16(code: i16) -> Self {
        code
    }
    #[inline(always)]
    fn to_i16(self) -> i16 {
        self
    }
}

/// What no encoder writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The code −2^(m−1) at this index.
    Forbidden(usize),
    /// Bits after the last code that are not zero.
    Padding,
}

/// Packs a block. `out` has [`packed_bytes`] bytes.
pub(crate) fn pack<T: Code>(codes: &[T], bits: u8, out: &mut [u8]) {
    debug_assert_eq!(out.len(), packed_bytes(codes.len(), bits));
    match bits {
        4 => {
            let (pairs, rest) = codes.as_chunks::<2>();
            for (byte, [low, high]) in out.iter_mut().zip(pairs) {
                *byte = (low.to_i16() as u8 & 0xF) | ((high.to_i16() as u8) << 4);
            }
            if let [last] = rest {
                out[codes.len() / 2] = last.to_i16() as u8 & 0xF;
            }
        }
        8 => out.iter_mut().zip(codes).for_each(|(byte, code)| *byte = code.to_i16() as u8),
        _ => {
            let mask = (1u32 << bits) - 1;
            let (mut buffer, mut filled, mut at) = (0u32, 0, 0);
            for code in codes {
                buffer |= (code.to_i16() as u32 & mask) << filled;
                filled += u32::from(bits);
                while filled >= 8 {
                    out[at] = buffer as u8;
                    (buffer, filled, at) = (buffer >> 8, filled - 8, at + 1);
                }
            }
            if filled > 0 {
                out[at] = buffer as u8;
            }
        }
    }
}

/// Unpacks a block of `codes.len()` codes and checks it.
pub(crate) fn unpack<T: Code>(bytes: &[u8], bits: u8, codes: &mut [T]) -> Result<(), Fault> {
    debug_assert_eq!(bytes.len(), packed_bytes(codes.len(), bits));
    let forbidden = -1i16 << (bits - 1);
    match bits {
        4 => {
            let n = codes.len();
            let (pairs, rest) = codes.as_chunks_mut::<2>();
            for ([low, high], &byte) in pairs.iter_mut().zip(bytes) {
                *low = T::from_i16(i16::from(((byte << 4) as i8) >> 4));
                *high = T::from_i16(i16::from(byte as i8 >> 4));
            }
            if let [last] = rest {
                let byte = bytes[n / 2];
                *last = T::from_i16(i16::from(((byte << 4) as i8) >> 4));
                if byte >> 4 != 0 {
                    return Err(Fault::Padding);
                }
            }
        }
        8 => codes.iter_mut().zip(bytes).for_each(|(code, &byte)| *code = T::from_i16(i16::from(byte as i8))),
        _ => {
            let unused = 16 - bits;
            let (mut buffer, mut filled, mut at) = (0u32, 0, 0);
            for code in codes.iter_mut() {
                while filled < u32::from(bits) {
                    buffer |= u32::from(bytes[at]) << filled;
                    (filled, at) = (filled + 8, at + 1);
                }
                *code = T::from_i16(((buffer as u16) << unused) as i16 >> unused);
                (buffer, filled) = (buffer >> bits, filled - u32::from(bits));
            }
            if buffer != 0 {
                return Err(Fault::Padding);
            }
        }
    }
    match codes.iter().position(|c| c.to_i16() == forbidden) {
        Some(index) => Err(Fault::Forbidden(index)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_every_width_and_length() {
        for bits in 2..=16u8 {
            let max = (1i32 << (bits - 1)) - 1;
            for n in 0..70usize {
                let codes: Vec<i16> = (0..n as i32).map(|i| ((i * 7919 + 3) % (2 * max + 1) - max) as i16).collect();
                let mut bytes = vec![0xAA; packed_bytes(n, bits)];
                pack(&codes, bits, &mut bytes);
                let mut back = vec![99i16; n];
                assert_eq!(unpack(&bytes, bits, &mut back), Ok(()));
                assert_eq!(back, codes, "{bits} bits, {n} codes");
            }
        }
    }

    #[test]
    fn low_nibble_comes_first() {
        let mut out = [0; 2];
        pack(&[1i8, -2, 7], 4, &mut out);
        assert_eq!(out, [0xE1, 0x07]);
    }

    #[test]
    fn forbidden_codes_and_padding_are_seen_in_every_width() {
        for bits in 2..=16u8 {
            let n = 9;
            let mut bytes = vec![0; packed_bytes(n, bits)];
            // Bit m − 1 of code 0 alone is −2^(m−1).
            bytes[usize::from(bits - 1) / 8] |= 1 << ((bits - 1) % 8);
            assert_eq!(unpack(&bytes, bits, &mut vec![0i16; n]), Err(Fault::Forbidden(0)), "{bits} bits");
            if n * usize::from(bits) % 8 != 0 {
                let mut bytes = vec![0; packed_bytes(n, bits)];
                *bytes.last_mut().unwrap() |= 0x80;
                assert_eq!(unpack(&bytes, bits, &mut vec![0i16; n]), Err(Fault::Padding), "{bits} bits");
            }
        }
    }
}
