//! 4-bit planes as panels of nibbles and back. Both hold eight codes in 32 bits, in different orders, so nothing is
//! unpacked on the way: loading a packed model moves words.
#![allow(unsafe_code, reason = "tasks that write disjoint panels")]

use super::codes::unpack_block;
use super::panels::{PanelLayout, PanelsMut, PlaneLines};
use crate::arch::generic::encode::{FAST_SCALES, STRIP};
use crate::error::{Error, Result};
use crate::format::{EXPONENT_OFFSET, NAN_EXPONENT};
use crate::pack::packed_bytes;
use std::ops::Range;

const BITS: u8 = 4;
/// Eight codes of 0 in a panel, where codes are raised by 8.
const ZEROS: u32 = 0x8888_8888;

/// The bytes' halves that hold codes, in word `w` of a block: an odd number of steps leaves the last high halves at 0.
#[inline(always)]
fn halves(w: usize, steps: usize) -> u32 {
    if 2 * w + 1 == steps { 0x0F0F_0F0F } else { u32::MAX }
}

/// The plane's codes 0 … 7 in the panel's order, 0 4 1 5 2 6 3 7: steps of four, two of them in each byte.
#[inline(always)]
fn interleaved(x: u32) -> u32 {
    let spread = |x: u32| {
        let x = (x | x << 8) & 0x00FF_00FF;
        (x | x << 4) & 0x0F0F_0F0F
    };
    spread(x & 0xFFFF) | spread(x >> 16) << 4
}

/// The inverse.
#[inline(always)]
fn in_order(x: u32) -> u32 {
    let gather = |x: u32| {
        let x = (x | x >> 4) & 0x00FF_00FF;
        (x | x >> 8) & 0xFFFF
    };
    gather(x & 0x0F0F_0F0F) | gather(x >> 4 & 0x0F0F_0F0F) << 16
}

/// Fills `blocks` of the panels of a strip.
///
/// # Errors
/// [`Error::Code`] for blocks that no encoder writes.
pub(crate) fn strip_of_planes(
    planes: &PlaneLines<'_>,
    layout: &PanelLayout,
    panels: &PanelsMut<'_>,
    matrix: usize,
    strip: usize,
    blocks: Range<usize>,
) -> Result<()> {
    let PanelLayout { lines, k, block, width, steps, .. } = *layout;
    let (words, block_bytes) = (steps.div_ceil(2), packed_bytes(block, BITS));
    for panel in strip * (STRIP / width)..(strip + 1) * (STRIP / width) {
        for b in blocks.clone() {
            let at = layout.panel_at(matrix, panel) + b * layout.block_bytes;
            // SAFETY: a block of a panel of this strip, which belongs to one task.
            let out = unsafe { panels.bytes.part(at, layout.block_bytes) };
            let (codes, exponents) = out.split_at_mut(4 * width * words);
            let codes = codes.as_chunks_mut::<4>().0;
            let bytes = packed_bytes(block.min(k - b * block), BITS);
            for (l, exponent) in exponents.iter_mut().enumerate() {
                let line = panel * width + l;
                if line >= lines {
                    (0..words).for_each(|w| codes[l + w * width] = (ZEROS & halves(w, steps)).to_le_bytes());
                    *exponent = EXPONENT_OFFSET as u8;
                    continue;
                }
                let row = matrix * planes.lines + line;
                let from = &planes.mantissas[row * planes.row + b * block_bytes..][..bytes];
                let c = planes.exponents[row * layout.blocks + b];
                let (mut any, mut forbidden) = (0, 0);
                let mut put = |w: usize, x: u32| {
                    let raised = x ^ ZEROS;
                    any |= x;
                    // The forbidden code −8 is a nibble of 0 now.
                    forbidden |= raised.wrapping_sub(0x1111_1111) & !raised & ZEROS;
                    codes[l + w * width] = (raised & halves(w, steps)).to_le_bytes();
                };
                let (whole, rest) = from.as_chunks::<4>();
                for (w, word) in whole.iter().enumerate() {
                    put(w, interleaved(u32::from_le_bytes(*word)));
                }
                if whole.len() < words {
                    let mut last = [0; 4];
                    last[..rest.len()].copy_from_slice(rest);
                    put(whole.len(), interleaved(u32::from_le_bytes(last)));
                    (whole.len() + 1..words).for_each(|w| put(w, 0));
                }
                let odd = block.min(k - b * block) % 2 == 1;
                if forbidden != 0 || (odd && from[bytes - 1] >> 4 != 0) || (c == NAN_EXPONENT && any != 0) {
                    let mut codes = vec![0i8; block.min(k - b * block)];
                    unpack_block(from, BITS, c, &mut codes).map_err(|(expected, found)| {
                        Error::code(expected, format!("{found} in block {b} of row {row}"))
                    })?;
                }
                // A block of zeros adds nothing under any exponent.
                *exponent = if any == 0 && c != NAN_EXPONENT { EXPONENT_OFFSET as u8 } else { c };
                if !FAST_SCALES.contains(&(i32::from(*exponent) - EXPONENT_OFFSET)) {
                    panels.set_general(layout.panel(matrix, panel));
                }
            }
        }
    }
    Ok(())
}

/// The planes of one matrix in panels of nibbles: exponents [lines, blocks], mantissas [lines, bytes of a row]. Blocks of
/// zeros get c = 0.
pub(crate) fn planes_of_nibbles(layout: &PanelLayout, panels: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let PanelLayout { lines, k, block, blocks, width, steps, .. } = *layout;
    let (words, block_bytes) = (steps.div_ceil(2), packed_bytes(block, BITS));
    let row_bytes = k / block * block_bytes + packed_bytes(k % block, BITS);
    let mut exponents = vec![0; lines * blocks];
    let mut mantissas = vec![0; lines * row_bytes];
    for line in 0..lines {
        let (panel, l) = (line / width, line % width);
        for b in 0..blocks {
            let from = &panels[panel * layout.panel_bytes() + b * layout.block_bytes..][..layout.block_bytes];
            let (codes, ends) = from.split_at(4 * width * words);
            let n = block.min(k - b * block);
            let out = &mut mantissas[line * row_bytes + b * block_bytes..][..packed_bytes(n, BITS)];
            let mut any = 0;
            let codes = codes.as_chunks::<4>().0;
            let mut take = |w: usize| {
                let x = in_order((u32::from_le_bytes(codes[l + w * width]) ^ ZEROS) & halves(w, steps));
                any |= x;
                x.to_le_bytes()
            };
            let (whole, rest) = out.as_chunks_mut::<4>();
            for (w, word) in whole.iter_mut().enumerate() {
                *word = take(w);
            }
            if !rest.is_empty() {
                rest.copy_from_slice(&take(whole.len())[..rest.len()]);
            }
            let c = ends[l];
            exponents[line * blocks + b] = if any == 0 && c != NAN_EXPONENT { 0 } else { c };
        }
    }
    (exponents, mantissas)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_permuted_and_back() {
        assert_eq!(interleaved(0x7654_3210), 0x7362_5140);
        for x in [0, u32::MAX, 0x7654_3210, 0x1234_5678, 0x8000_0001] {
            assert_eq!(in_order(interleaved(x)), x);
        }
    }
}
