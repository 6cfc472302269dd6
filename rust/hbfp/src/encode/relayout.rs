//! Planes of 4 and 8 bits as panels, and 4-bit ones back. Both hold eight or four codes in 32 bits, in different orders, so
//! nothing is unpacked on the way: loading a packed model moves words.
#![allow(unsafe_code, reason = "calls of kernels, and tasks that write disjoint panels")]

use super::codes::unpack_block;
use super::filling::PlaneLines;
use super::panels::{Form, PanelLayout, PanelsMut, Side};
use crate::arch::generic::encode::{FAST_SCALES, STRIP};
use crate::arch::generic::product::RIDER;
use crate::arch::kernels::Kernels;
use crate::error::{Error, Result};
use crate::format::{EXPONENT_OFFSET, NAN_EXPONENT};
use crate::pack::packed_bytes;
use std::ops::{Range, RangeInclusive};

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

/// Fills the ordinary blocks of the panels of a strip, if that can be done in words, and says which ones it left: `left` has
/// one flag a block. Ordinary blocks are whole, hold a code that is not 0 and none that is forbidden, under an exponent of
/// the fast range, in each line of the panel.
pub(crate) fn ordinary_blocks(
    kernels: &Kernels,
    planes: &PlaneLines<'_>,
    bits: u8,
    layout: &PanelLayout,
    panels: &PanelsMut<'_>,
    [matrix, strip]: [usize; 2],
    left: &mut Vec<bool>,
) {
    let PanelLayout { lines, block, blocks, width, .. } = *layout;
    left.clear();
    left.resize(blocks, true);
    let nibbles = match (bits, layout.form) {
        (4, Form::Nibbles) => true,
        (8, Form::Bytes) if layout.side == (Side::Right { offset: 128 }) => false,
        _ => return,
    };
    let (bytes, per_strip) = (packed_bytes(block, bits), STRIP / width);
    // Whole blocks of words that fill registers.
    let words = bytes / 4;
    let lanes = kernels.columns / 2;
    let whole = (0..lanes).map(|x| layout.k / block - x.min(layout.k / block)).find(|n| n * words % lanes == 0);
    let whole = whole.unwrap_or(0);
    let last = (strip + 1) * STRIP;
    if bytes % 4 != 0 || whole == 0 || last > lines || width != kernels.columns {
        return;
    }
    left[..whole].fill(false);
    for panel in strip * per_strip..(strip + 1) * per_strip {
        let first = matrix * planes.lines + panel * width;
        let from = &planes.mantissas[first * planes.row..(first + width) * planes.row];
        let exponents = &planes.exponents[first * blocks..(first + width) * blocks];
        let at = layout.panel_at(matrix, panel);
        assert!(whole * bytes <= planes.row && 4 * words * width < layout.block_bytes);
        // SAFETY: blocks of a panel of this strip, which belongs to one task.
        let out = unsafe { panels.bytes.part(at, whole * layout.block_bytes) };
        let turn = kernels.panel_of_lines[usize::from(!nibbles)];
        // SAFETY: `width` lines of `planes.row` bytes; the blocks of `out` end with the exponents; whole blocks fill registers.
        unsafe { turn(from.as_ptr(), planes.row, words, out.as_mut_ptr(), layout.block_bytes, &mut left[..whole]) };
        for ((b, left), out) in left[..whole].iter_mut().enumerate().zip(out.chunks_exact_mut(layout.block_bytes)) {
            let mut c = [0; STRIP];
            for (c, line) in c.iter_mut().zip(exponents.chunks_exact(blocks)) {
                *c = line[b];
            }
            let c = &c[..width];
            *left |= c.iter().fold(false, |slow, &c| slow | !FAST_BYTES.contains(&c));
            let ends = &mut out[4 * words * width..];
            if nibbles {
                ends.copy_from_slice(c);
            } else {
                for (end, &c) in ends.as_chunks_mut::<4>().0.iter_mut().zip(c) {
                    let scale = i32::from(c) - EXPONENT_OFFSET;
                    *end = RIDER.wrapping_add(scale << 23).to_le_bytes();
                }
            }
        }
    }
}

/// Exponent bytes of the fast range.
const FAST_BYTES: RangeInclusive<u8> =
    (*FAST_SCALES.start() + EXPONENT_OFFSET) as u8..=(*FAST_SCALES.end() + EXPONENT_OFFSET) as u8;

/// Fills `blocks` of the panels of nibbles of a strip.
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
