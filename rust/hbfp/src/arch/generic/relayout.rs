//! Lines of codes, each of them contiguous, as a right operand's panel: four codes of a byte, or eight of a nibble, are a word in
//! both, so this is a transposition of words. In panels codes are raised, to be unsigned.

use crate::arch::simd::Simd;

/// The most lanes that a register has.
const MOST: usize = 16;

/// Fills the codes of a panel of `2 * LANES` lines: word w of block b of line l goes to
/// `out + b * block_bytes + 4 * (w * 2 * LANES + l)`. Codes are raised by 8, and the eight of a word change their order as
/// [`interleaved`] says, or raised by 128.
///
/// `special[b]` is set where some line's block is zero, or holds a code that no encoder writes.
///
/// # Safety
/// With n = `words * special.len()`, a multiple of LANES, and `words` > 0:
/// - line l, `lines + l * row`, is valid for reading n words, l < `2 * LANES`;
/// - `out + b * block_bytes` is valid for writing `words * 2 * LANES` words, for every block b.
#[inline(always)]
pub(crate) unsafe fn panel_of_lines<S: Simd, const NIBBLES: bool>(
    s: S,
    lines: *const u8,
    row: usize,
    words: usize,
    out: *mut u8,
    block_bytes: usize,
    special: &mut [bool],
) {
    let width = 2 * S::LANES;
    let sign = if NIBBLES { 0x8888_8888_u32 } else { 0x8080_8080 } as i32;
    let (sign, rest, ones) = (s.splat(sign), s.splat(!sign), s.splat(-1));
    // Per half of the panel: bits that some code of the block has, by line, and signs of forbidden codes.
    let mut seen = [[s.splat(0); 2]; 2];
    // The block and the word in it that comes next.
    let (mut block, mut word) = (0, 0);
    for at in (0..words * special.len()).step_by(S::LANES) {
        let next = (block, word);
        for (half, seen) in seen.iter_mut().enumerate() {
            (block, word) = next;
            let [mut any, mut forbidden] = *seen;
            let first = lines.wrapping_add(half * S::LANES * row + 4 * at);
            let mut x = [s.splat(0); MOST];
            for (l, x) in x.iter_mut().enumerate().take(S::LANES) {
                // SAFETY: LANES words of one of the lines, from word `at` on.
                let codes = unsafe { s.load(first.wrapping_add(l * row).cast()) };
                *x = if NIBBLES { interleaved(s, codes) } else { codes };
            }
            transpose(s, &mut x);
            for &x in x.iter().take(S::LANES) {
                any = s.or(any, x);
                // A code without bits but its sign: adding brings a carry into the sign from any other bit.
                let others = s.add(s.and(x, rest), rest);
                forbidden = s.or(forbidden, s.and(x, s.xor(others, ones)));
                let to = out.wrapping_add(block * block_bytes + 4 * (word * width + half * S::LANES));
                // SAFETY: this half of a word's row in a block.
                unsafe { s.store(to.cast(), s.xor(x, sign)) };
                word += 1;
                if word == words {
                    let f = s.and(forbidden, sign);
                    let [zero, f] = [s.xor(sign_if_any(s, any), ones), sign_if_any(s, f)];
                    special[block] |= s.any_negative(s.or(zero, f));
                    (any, forbidden) = (s.splat(0), s.splat(0));
                    (block, word) = (block + 1, 0);
                }
            }
            *seen = [any, forbidden];
        }
    }
}

/// Lanes whose sign is set where a bit of `v`'s lane is.
#[inline(always)]
fn sign_if_any<S: Simd>(s: S, v: S::V) -> S::V {
    s.or(v, s.sub(s.splat(0), v))
}

/// Nibbles 0 … 7 of each lane as 0 4 1 5 2 6 3 7: steps of four, two of them in each byte.
#[inline(always)]
fn interleaved<S: Simd>(s: S, x: S::V) -> S::V {
    // Its two middle bytes change places, then in each half the two middle nibbles.
    let t = s.and(s.xor(x, s.sar::<8>(x)), s.splat(0x0000_FF00));
    let x = s.xor(s.xor(x, t), s.shl::<8>(t));
    let t = s.and(s.xor(x, s.sar::<4>(x)), s.splat(0x00F0_00F0));
    s.xor(s.xor(x, t), s.shl::<4>(t))
}

/// Of the first LANES registers, lane j of register i becomes lane i of register j.
#[inline(always)]
fn transpose<S: Simd>(s: S, x: &mut [S::V; MOST]) {
    let chunks = S::LANES / 4;
    for four in x.as_chunks_mut::<4>().0.iter_mut().take(chunks) {
        *four = s.transpose_words(*four);
    }
    // Chunk c of register 4 g + j holds word 4 c + j of lines 4 g …: now chunks and groups g are exchanged.
    let from = *x;
    for j in 0..4 {
        if chunks == 2 {
            [x[j], x[4 + j]] = s.unzip_chunks(from[j], from[4 + j]);
        } else {
            let low = s.unzip_chunks(from[j], from[4 + j]);
            let high = s.unzip_chunks(from[8 + j], from[12 + j]);
            for odd in 0..2 {
                [x[4 * odd + j], x[4 * (2 + odd) + j]] = s.unzip_chunks(low[odd], high[odd]);
            }
        }
    }
}
