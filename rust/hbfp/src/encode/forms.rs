//! Other forms of panels, block by block: lines of a left operand one by one, and what is kept of either.

#![allow(unsafe_code, reason = "panels put together from lines that lie anywhere")]

use super::panels::{PanelLayout, Side};
use crate::arch::generic::product::{Correction, PANEL_ROWS, RIDER};
use crate::format::{EXPONENT_OFFSET, MAX_BLOCK};

/// Bytes behind the codes of a left panel's block: corrections, riders.
const ENDS: usize = 8 * PANEL_ROWS;

fn exponent_byte(rider: i32) -> u8 {
    ((rider >> 23) + EXPONENT_OFFSET) as u8
}

fn word(bytes: &[u8]) -> i32 {
    i32::from_le_bytes(bytes[..4].try_into().expect("four bytes"))
}

/// A right panel's block with two codes a byte, from one with a byte each.
pub(crate) fn to_nibbles(from: &[u8], layout: &PanelLayout, into: &mut [u8]) {
    let row = 4 * layout.width;
    let (codes, riders) = from.split_at(row * layout.steps);
    let (nibbles, exponents) = into.split_at_mut(row * layout.steps.div_ceil(2));
    pairs_to_nibbles(codes, row, nibbles);
    for (out, rider) in exponents.iter_mut().zip(riders.as_chunks::<4>().0) {
        *out = exponent_byte(i32::from_le_bytes(*rider).wrapping_sub(RIDER));
    }
}

/// Rows of codes, two of them in one: the first in the low halves of the bytes.
fn pairs_to_nibbles(codes: &[u8], row: usize, nibbles: &mut [u8]) {
    for (out, pair) in nibbles.chunks_exact_mut(row).zip(codes.chunks(2 * row)) {
        let (even, odd) = pair.split_at(row);
        for (out, even) in out.iter_mut().zip(even) {
            *out = even & 15;
        }
        for (out, odd) in out.iter_mut().zip(odd) {
            *out |= odd << 4;
        }
    }
}

/// Word i of part j to word j of part i.
///
/// # Safety
/// Each part is valid for reading or writing 16 bytes.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn transpose(from: [*const u8; PANEL_ROWS], to: [*mut u8; PANEL_ROWS]) {
    use std::arch::x86_64::*;
    // SAFETY: SSE2 is part of the architecture; the caller vouches for the memory.
    unsafe {
        let [a, b, c, d] = from.map(|part| _mm_loadu_si128(part.cast()));
        let (ab0, ab1) = (_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b));
        let (cd0, cd1) = (_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d));
        _mm_storeu_si128(to[0].cast(), _mm_unpacklo_epi64(ab0, cd0));
        _mm_storeu_si128(to[1].cast(), _mm_unpackhi_epi64(ab0, cd0));
        _mm_storeu_si128(to[2].cast(), _mm_unpacklo_epi64(ab1, cd1));
        _mm_storeu_si128(to[3].cast(), _mm_unpackhi_epi64(ab1, cd1));
    }
}

/// Word i of part j to word j of part i.
///
/// # Safety
/// Each part is valid for reading or writing 16 bytes.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
unsafe fn transpose(from: [*const u8; PANEL_ROWS], to: [*mut u8; PANEL_ROWS]) {
    // SAFETY: the caller vouches for the memory.
    unsafe {
        let words = from.map(|part| part.cast::<[u32; 4]>().read_unaligned());
        for (i, to) in to.into_iter().enumerate() {
            to.cast::<[u32; 4]>().write_unaligned(words.map(|words| words[i]));
        }
    }
}

/// The four lines of a left panel's block, whose steps have `step` bytes a line: codes, correction, rider.
///
/// # Safety
/// Each of `lines` is valid for writing a quarter of the panel's bytes.
#[inline]
pub(crate) unsafe fn to_lines(panel: &[u8], step: usize, lines: [*mut u8; PANEL_ROWS]) {
    let codes = panel.len() - ENDS;
    let line_codes = codes / PANEL_ROWS;
    let from = panel.as_ptr();
    // SAFETY: all of it lies inside the panel and the lines.
    unsafe {
        if step == 4 {
            // Four steps at a time are a transposition of words.
            let whole = line_codes / 16 * 16;
            for t in (0..whole).step_by(16) {
                let steps = [0, 16, 32, 48].map(|at| from.add(PANEL_ROWS * t + at));
                transpose(steps, lines.map(|line| line.wrapping_add(t)));
            }
            for t in (whole..line_codes).step_by(4) {
                for (lane, line) in lines.iter().enumerate() {
                    let word = from.add(PANEL_ROWS * t + 4 * lane).cast::<u32>().read_unaligned();
                    line.add(t).cast::<u32>().write_unaligned(word);
                }
            }
        } else {
            for t in (0..line_codes).step_by(8) {
                for (lane, line) in lines.iter().enumerate() {
                    let word = from.add(PANEL_ROWS * t + 8 * lane).cast::<u64>().read_unaligned();
                    line.add(t).cast::<u64>().write_unaligned(word);
                }
            }
        }
        let [corrections, riders] = from.add(codes).cast::<[[u32; PANEL_ROWS]; 2]>().read_unaligned();
        for (lane, line) in lines.iter().enumerate() {
            line.add(line_codes).cast::<[u32; 2]>().write_unaligned([corrections[lane], riders[lane]]);
        }
    }
}

/// A left panel's block of any four lines.
///
/// # Safety
/// Each of `lines` is valid for reading a quarter of the panel's bytes.
#[inline]
pub(crate) unsafe fn from_lines(lines: [*const u8; PANEL_ROWS], step: usize, panel: &mut [u8]) {
    let codes = panel.len() - ENDS;
    let line_codes = codes / PANEL_ROWS;
    let to = panel.as_mut_ptr();
    // SAFETY: all of it lies inside the lines and the panel.
    unsafe {
        if step == 4 {
            // Four steps at a time are a transposition of words.
            let whole = line_codes / 16 * 16;
            for t in (0..whole).step_by(16) {
                let steps = [0, 16, 32, 48].map(|at| to.add(PANEL_ROWS * t + at));
                transpose(lines.map(|line| line.wrapping_add(t)), steps);
            }
            for t in (whole..line_codes).step_by(4) {
                for (lane, line) in lines.iter().enumerate() {
                    let word = line.add(t).cast::<u32>().read_unaligned();
                    to.add(PANEL_ROWS * t + 4 * lane).cast::<u32>().write_unaligned(word);
                }
            }
        } else {
            for t in (0..line_codes).step_by(8) {
                for (lane, line) in lines.iter().enumerate() {
                    let word = line.add(t).cast::<u64>().read_unaligned();
                    to.add(PANEL_ROWS * t + 8 * lane).cast::<u64>().write_unaligned(word);
                }
            }
        }
        let ends = lines.map(|line| line.add(line_codes).cast::<[u32; 2]>().read_unaligned());
        to.add(codes).cast::<[[u32; 4]; 2]>().write_unaligned([ends.map(|ends| ends[0]), ends.map(|ends| ends[1])]);
    }
}

/// What is kept of a left panel's block: codes, two a byte or one, and four exponent bytes.
pub(crate) fn to_compact(panel: &[u8], step: usize, nibbles: bool, into: &mut [u8]) {
    let (codes, ends) = panel.split_at(panel.len() - ENDS);
    let at = into.len() - PANEL_ROWS;
    let (kept, exponents) = into.split_at_mut(at);
    if step == 8 {
        // 16-bit codes of k 0, 2, 1, 3.
        for (to, from) in kept.as_chunks_mut::<4>().0.iter_mut().zip(codes.as_chunks::<8>().0) {
            *to = [from[0], from[4], from[2], from[6]];
        }
    } else if nibbles {
        pairs_to_nibbles(codes, 4 * PANEL_ROWS, kept);
    } else {
        kept.copy_from_slice(codes);
    }
    for (lane, exponent) in exponents.iter_mut().enumerate() {
        *exponent = exponent_byte(word(&ends[16 + 4 * lane..]));
    }
}

/// The left panel's block that [`to_compact`] kept.
pub(crate) fn from_compact(kept: &[u8], layout: &PanelLayout, nibbles: bool, panel: &mut [u8]) {
    const ROW: usize = 4 * PANEL_ROWS;
    let at = panel.len() - ENDS;
    let (codes, ends) = panel.split_at_mut(at);
    let (kept, exponents) = kept.split_at(kept.len() - PANEL_ROWS);
    let Side::Left { correction, offset } = layout.side else { unreachable!("a left operand") };
    debug_assert!(!(nibbles && correction == Correction::Wide), "wide panels are for codes of more than 4 bits");
    // Per line its codes 0 and 1 of each step, and 2 and 3.
    let mut sums = [0i32; 2 * PANEL_ROWS];
    let mut add = |row: &[u8; ROW]| {
        for (sum, pair) in sums.iter_mut().zip(row.as_chunks::<2>().0) {
            *sum += i32::from(pair[0] as i8) + i32::from(pair[1] as i8);
        }
    };
    if correction == Correction::Wide {
        for (to, from) in codes.as_chunks_mut::<{ 2 * ROW }>().0.iter_mut().zip(kept.as_chunks::<ROW>().0) {
            add(from);
            for (to, q) in to.as_chunks_mut::<8>().0.iter_mut().zip(from.as_chunks::<4>().0) {
                for (to, j) in to.as_chunks_mut::<2>().0.iter_mut().zip([0, 2, 1, 3]) {
                    *to = i16::from(q[j] as i8).to_le_bytes();
                }
            }
        }
    } else if nibbles {
        // Sums of codes of 4 bits fit half the width.
        const { assert!(MAX_BLOCK / 2 * 8 < 1 << 15) };
        let mut halves = [0i16; 2 * PANEL_ROWS];
        let mut add = |row: &[u8; ROW]| {
            for (sum, pair) in halves.iter_mut().zip(row.as_chunks::<2>().0) {
                let pair = i16::from_le_bytes(*pair);
                *sum += ((pair << 8) >> 8) + (pair >> 8);
            }
        };
        for (to, from) in codes.chunks_mut(2 * ROW).zip(kept.as_chunks::<ROW>().0) {
            let (even, odd) = to.split_at_mut(ROW);
            let mut row = from.map(|b| ((b & 15) ^ 8).wrapping_sub(8));
            add(&row);
            even.copy_from_slice(&row);
            if !odd.is_empty() {
                row = from.map(|b| ((b >> 4) ^ 8).wrapping_sub(8));
                add(&row);
                odd.copy_from_slice(&row);
            }
        }
        sums = halves.map(i32::from);
    } else {
        for (to, from) in codes.as_chunks_mut::<ROW>().0.iter_mut().zip(kept.as_chunks::<ROW>().0) {
            add(from);
            *to = *from;
        }
    }
    for lane in 0..PANEL_ROWS {
        let rider = (i32::from(exponents[lane]) - EXPONENT_OFFSET) << 23;
        let [low, high] = [sums[2 * lane], sums[2 * lane + 1]].map(|sum| (-offset).wrapping_mul(sum));
        let correction = match correction {
            Correction::Halves => (low & 0xFFFF) | (high << 16),
            Correction::Total | Correction::Wide => rider.wrapping_add(low).wrapping_add(high),
        };
        ends[4 * lane..4 * lane + 4].copy_from_slice(&correction.to_le_bytes());
        ends[16 + 4 * lane..20 + 4 * lane].copy_from_slice(&rider.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::kernels::{Kernels, models};
    use crate::encode::Context;
    use crate::encode::blocks::RoundingMode;
    use crate::encode::filling::{Job, Source, fill};
    use crate::encode::panels::{Form, Panels};
    use crate::format::{BlockFormat, BlockShape};
    use crate::parallel::Serial;
    use crate::shape::FloatTensor;
    use crate::testing::Fill;

    /// Panels of [4, k] floats of all kinds as the encoder writes them; and as lines and compact, in the same order.
    fn encoded(kernels: &'static Kernels, format: BlockFormat, layouts: &[PanelLayout], k: usize) -> Vec<Vec<u8>> {
        let mut values = Fill::Wide.values(4 * k, u64::from(format.bits()));
        // A line of ordinary values, one of NaN, one of zeros.
        values[..k].copy_from_slice(&Fill::Plain.values(k, 9));
        values[k + k / 2] = f32::NAN;
        values[2 * k..3 * k].fill(-0.0);
        let ctx = Context { kernels, team: &Serial, threads: 1 };
        let lines = FloatTensor::new(&values, &[4, k]).unwrap().lines(1).unwrap();
        let source = Source::Floats(&lines, RoundingMode::NEAREST_EVEN);
        let panels = |&layout: &PanelLayout| {
            let mut panels = Panels::default();
            let job = Job::new(&source, format, layout, panels.reserve(&layout));
            fill(&ctx, job, &mut Vec::new()).unwrap();
            // SAFETY: the first panel was written.
            unsafe { std::slice::from_raw_parts(panels.bytes.as_ptr(), layout.panel_bytes()) }.to_vec()
        };
        layouts.iter().map(panels).collect()
    }

    #[test]
    fn every_form_of_a_left_panel_gives_it_back() {
        // Hunted: a step, a nibble or a correction that is lost on the way, at any width, length and correction.
        for (kernels, bits) in
            [models::avx2(), models::avx512vnni()].into_iter().flat_map(|x| (2..=8).map(move |b| (x, b)))
        {
            for block in (1..=40).chain([63, 64, 65, 100, 256]) {
                for (correction, right) in [
                    (Correction::Total, 2),
                    (Correction::Total, 8),
                    (Correction::Halves, 4),
                    (Correction::Halves, 6),
                    (Correction::Wide, 8),
                ] {
                    if correction == Correction::Wide && bits <= 4 {
                        continue; // these fit narrower sums
                    }
                    let format = BlockFormat::new(bits, BlockShape::Line(block)).unwrap();
                    let k = 2 * block + block / 2;
                    let side = Side::Left { correction, offset: 1 << (right - 1) };
                    let layout = PanelLayout::new([1, 4, k], block, PANEL_ROWS, side);
                    // Kept without knowledge of the other operand, as a convolution keeps its image.
                    let unaware = Side::Left { correction: Correction::Total, offset: 0 };
                    let kept = PanelLayout::new([1, 4, k], block, PANEL_ROWS, unaware).compact(bits);
                    let own = layout.compact(bits);
                    let all = encoded(kernels, format, &[layout, kept, own], k);
                    let what = format!("{format} against {right} bits, {correction:?}");
                    let [plain, kept_bytes, own_bytes] = &all[..] else { unreachable!() };
                    let mut panel = vec![0x5A; layout.block_bytes];
                    for (b, plain) in plain.chunks_exact(layout.block_bytes).enumerate() {
                        for (layout_kept, bytes) in [(kept, kept_bytes), (own, own_bytes)] {
                            let Form::Compact { nibbles } = layout_kept.form else { unreachable!() };
                            let from = &bytes[b * layout_kept.block_bytes..][..layout_kept.block_bytes];
                            from_compact(from, &layout, nibbles, &mut panel);
                            assert_eq!(panel, plain, "{what}: compact block {b}");
                            panel.fill(0x5A);
                        }
                        let line = layout.block_bytes / PANEL_ROWS;
                        let mut lines = vec![0x5A; layout.block_bytes];
                        let starts: [_; PANEL_ROWS] =
                            std::array::from_fn(|lane| lines[lane * line..][..line].as_mut_ptr());
                        // SAFETY: a quarter of the panel's block each.
                        unsafe { to_lines(plain, layout.step(), starts) };
                        let starts = starts.map(<*mut u8>::cast_const);
                        // SAFETY: a quarter of the panel's block each.
                        unsafe { from_lines(starts, layout.step(), &mut panel) };
                        assert_eq!(panel, plain, "{what}: block {b} of lines");
                    }
                }
            }
        }
    }
}
