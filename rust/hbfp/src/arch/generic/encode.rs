//! Encoding: largest magnitude, scaling, rounding, for lines that are contiguous (`row`) and for 32 neighbouring lines
//! whose elements lie side by side (`strip`).
//!
//! ```text
//! y = clamp(x · 2^−s, −Q, Q)              2^−s is one f32 for every s in −127…127; the product is exact, or so small
//!                                         that every rounding gives what the exact product gives
//! nearest even   q = RNE(y)               nearest away   q = t + trunc(2 (y − t)), t = trunc(y)
//! toward zero    q = trunc(y)             stochastic     q = (RNE(65536 y) + r) >> 16
//! ```

use super::product::{Correction, RIDER};
use crate::arch::simd::Simd;
use crate::format::{BlockFormat, EXPONENT_OFFSET, NAN_EXPONENT, Rounding};

/// Scale exponents whose every pairwise sum s lies in −126…104: 2^s is a normal number, and the exponent can ride in an
/// accumulator.
pub(crate) const FAST_SCALES: std::ops::RangeInclusive<i32> = -63..=52;

/// Lines of a strip.
pub(crate) const STRIP: usize = 32;
/// Strips that are staged together: longer runs of memory, still within the first-level cache.
pub(crate) const STRIPS_STAGED: usize = 2;
/// Elements that the row kernels may read past a line of random bits and write past a line of codes.
pub(crate) const ROW_PADDING: usize = 64;

pub(crate) const NEAREST_EVEN: u8 = Rounding::NearestEven as u8;
pub(crate) const NEAREST_AWAY: u8 = Rounding::NearestAway as u8;
pub(crate) const TOWARD_ZERO: u8 = Rounding::TowardZero as u8;
pub(crate) const STOCHASTIC: u8 = Rounding::Stochastic as u8;

/// Elements by which reading along lines is ahead of encoding.
const AHEAD: usize = 128;
const MAGNITUDE: i32 = 0x7FFF_FFFF;

/// Scaling of one block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scaling {
    /// 2^−s.
    pub(crate) inverse: f32,
    /// Q.
    pub(crate) limit: f32,
}

/// y rounded.
#[inline(always)]
pub(super) fn round<S: Simd, const R: u8>(s: S, y: S::V, random: S::V) -> S::V {
    match R {
        NEAREST_EVEN => s.round_to_i32(y),
        NEAREST_AWAY => {
            let t = s.truncate_to_i32(y);
            let rest = s.sub_f32(y, s.to_f32(t));
            s.add(t, s.truncate_to_i32(s.add_f32(rest, rest)))
        }
        TOWARD_ZERO => s.truncate_to_i32(y),
        _ => s.sar::<16>(s.add(s.round_to_i32(s.mul_f32(y, s.splat_f32(65536.0))), random)),
    }
}

/// x scaled, clamped and rounded.
#[inline(always)]
fn code<S: Simd, const R: u8>(s: S, x: S::V, inverse: S::V, limit: S::V, minus_limit: S::V, random: S::V) -> S::V {
    round::<S, R>(s, s.max_f32(s.min_f32(s.mul_f32(x, inverse), limit), minus_limit), random)
}

/// Largest |x| of `n` contiguous elements, as bits.
///
/// # Safety
/// `x` is valid for reading `n` elements.
#[inline(always)]
pub(crate) unsafe fn amax_row<S: Simd>(s: S, x: *const f32, n: usize) -> u32 {
    // SAFETY: every access below is inside the n elements.
    unsafe {
        let magnitude = s.splat(MAGNITUDE);
        let mut m = [s.splat(0); 2];
        let mut i = 0;
        while i + 2 * S::LANES <= n {
            m[0] = s.max_i32(m[0], s.and(s.load(x.add(i).cast()), magnitude));
            m[1] = s.max_i32(m[1], s.and(s.load(x.add(i + S::LANES).cast()), magnitude));
            i += 2 * S::LANES;
        }
        if i + S::LANES <= n {
            m[0] = s.max_i32(m[0], s.and(s.load(x.add(i).cast()), magnitude));
            i += S::LANES;
        }
        let mut amax = s.reduce_max_i32(s.max_i32(m[0], m[1])) as u32;
        while i < n {
            amax = amax.max((*x.add(i)).to_bits() & MAGNITUDE as u32);
            i += 1;
        }
        amax
    }
}

/// Loads `take` ≤ 64 elements of a line's end, zeros after them.
///
/// # Safety
/// `x` is valid for reading `take` elements.
#[inline(always)]
unsafe fn padded_tail(x: *const f32, take: usize) -> [f32; ROW_PADDING] {
    let mut tail = [0.0; ROW_PADDING];
    // SAFETY: the caller vouches for the source; take ≤ 64.
    unsafe { std::ptr::copy_nonoverlapping(x, tail.as_mut_ptr(), take) };
    tail
}

/// How the blocks of an operand become panels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PanelCoding {
    format: BlockFormat,
    /// The scale exponent of a block is ((bits of amax + `carry`) >> 23) + `shift`, clamped, where amax is normal.
    carry: i32,
    shift: i32,
    clamp: [i32; 2],
    pub(super) limit: i32,
    /// What the right operand's codes are raised by.
    offset: i32,
    /// What a left operand carries; None for a right one.
    correction: Option<Correction>,
}

impl PanelCoding {
    pub(crate) fn new(format: BlockFormat, offset: i32, correction: Option<Correction>) -> Self {
        let (carry, up) = format.exponent_carry();
        let shift = up - 127 - (i32::from(format.bits()) - 1);
        let limit = format.max_code();
        debug_assert!(format.encodes_to_panels());
        Self { format, carry, shift, clamp: format.scale_range(), limit, offset, correction }
    }
}

/// What codes are limited to, in words of four.
#[derive(Clone, Copy)]
pub(super) struct Limits<V> {
    most: V,
    least: V,
}

impl<V: Copy> Limits<V> {
    #[inline(always)]
    pub(super) fn new<S: Simd<V = V>>(s: S, coding: &PanelCoding) -> Self {
        let bytes = |code: i32| s.splat((code as u8 as u32 * 0x0101_0101) as i32);
        Self { most: bytes(coding.limit), least: bytes(-coding.limit) }
    }
    #[inline(always)]
    pub(super) fn apply<S: Simd<V = V>>(self, s: S, codes: V) -> V {
        s.max_i8(s.min_i8(codes, self.most), self.least)
    }
}

/// Where a panel's block goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockPlace {
    /// Codes of the first step.
    pub(crate) codes: *mut u8,
    /// Corrections and riders (left) or riders (right).
    pub(crate) ends: *mut u8,
    /// Bytes from a step to the next.
    pub(crate) step: usize,
    /// Bytes from four lines to the next four.
    pub(crate) chunk: usize,
    pub(crate) steps: usize,
}

/// Scale exponents of blocks, one a lane.
pub(super) struct Scales<V> {
    pub(super) scale: V,
    /// Zeros in the lanes of NaN blocks, where there are any.
    pub(super) keep: Option<V>,
    /// Whether one is outside the fast range.
    pub(super) general: bool,
}

#[inline(always)]
pub(super) fn scales<S: Simd>(s: S, amax: S::V, coding: &PanelCoding) -> Scales<S::V> {
    let exponent = s.sar::<23>(s.add(amax, s.splat(coding.carry)));
    let scale = s.add(exponent, s.splat(coding.shift));
    let scale = s.min_i32(s.max_i32(scale, s.splat(coding.clamp[0])), s.splat(coding.clamp[1]));
    // Negative in lanes whose amax is zero, subnormal, infinite or NaN.
    let unusual = s.or(s.sub(amax, s.splat(0x0080_0000)), s.sub(s.splat(0x7F7F_FFFF), amax));
    let (scale, keep) = if s.any_negative(unusual) {
        let (mut bits, mut keep) = ([0i32; 16], [-1i32; 16]);
        // SAFETY: a register has at most 16 lanes.
        unsafe { s.store(bits.as_mut_ptr(), amax) };
        for (bits, keep) in bits.iter_mut().zip(&mut keep) {
            let c = coding.format.exponent_code(*bits as u32);
            // A block of zeros adds nothing under any exponent.
            *bits = if *bits == 0 { 0 } else { i32::from(c) - EXPONENT_OFFSET };
            *keep = if c == NAN_EXPONENT { 0 } else { -1 };
        }
        // SAFETY: as above.
        unsafe { (s.load(bits.as_ptr()), Some(s.load(keep.as_ptr()))) }
    } else {
        (scale, None)
    };
    let outside = s.or(s.sub(scale, s.splat(*FAST_SCALES.start())), s.sub(s.splat(*FAST_SCALES.end()), scale));
    Scales { scale, keep, general: s.any_negative(outside) }
}

/// 2^−scale, also where it is subnormal.
#[inline(always)]
pub(super) fn inverses<S: Simd>(s: S, scale: S::V) -> S::V {
    s.max_i32(s.shl::<23>(s.sub(s.splat(127), scale)), s.splat(0x0040_0000))
}

/// Running sums of a left operand's codes.
#[derive(Clone, Copy)]
struct CodeSums<V> {
    halves: V,
    /// Times −OFF.
    total: V,
}

/// Adds codes, given as signed bytes in words of four k.
#[inline(always)]
fn add_codes<S: Simd>(s: S, sums: &mut CodeSums<S::V>, words: [S::V; 4], minus_offset: S::V) {
    let ones = s.splat(0x0101_0101);
    let pairs = s.add_i16(
        s.add_i16(s.mul_pairs(ones, words[0]), s.mul_pairs(ones, words[1])),
        s.add_i16(s.mul_pairs(ones, words[2]), s.mul_pairs(ones, words[3])),
    );
    sums.halves = s.add_i16(sums.halves, pairs);
    sums.total = s.add(sums.total, s.mul_halves(pairs, minus_offset));
}

#[inline(always)]
fn minus_offset<S: Simd>(s: S, coding: &PanelCoding) -> S::V {
    let half = -coding.offset;
    s.splat((half & 0xFFFF) | (half << 16))
}

/// The correction word of a left operand's lines.
#[inline(always)]
fn correction<S: Simd>(s: S, sums: CodeSums<S::V>, rider: S::V, coding: &PanelCoding) -> S::V {
    match coding.correction {
        Some(Correction::Halves) => s.mul_i16(sums.halves, minus_offset(s, coding)),
        _ => s.add(rider, sums.total),
    }
}

/// What [`PanelCoding::correction`] makes of codes, known to the compiler.
const RIGHT: u8 = 0;
const LEFT: u8 = 1;
const WIDE: u8 = 2;

/// Codes as the panel holds them, to the chunks of a step.
///
/// # Safety
/// The places of the chunks are valid for writing 16 bytes each, 32 for wide codes.
#[inline(always)]
unsafe fn store_codes<S: Simd, const SIDE: u8>(s: S, coding: &PanelCoding, words: S::V, p: *mut u8, stride: usize) {
    // SAFETY: the caller vouches for the places.
    unsafe {
        match SIDE {
            RIGHT => {
                // In unsigned bytes: x + 128, then − (128 − offset), which never borrows.
                let raised = s.xor(words, s.splat(0x8080_8080_u32 as i32));
                let lower = (128 - coding.offset) * 0x0101_0101;
                s.store_chunks(p, stride, s.sub(raised, s.splat(lower)));
            }
            LEFT => s.store_chunks(p, stride, words),
            _ => {
                let [low, high] = s.widen_bytes(words);
                s.store_chunks(p, stride, low);
                s.store_chunks(p.add(16), stride, high);
            }
        }
    }
}

/// A register of a line, zeros past its end.
///
/// # Safety
/// `x` is valid for reading `left` elements.
#[inline(always)]
pub(super) unsafe fn load_up_to<S: Simd>(s: S, x: *const f32, left: usize) -> S::V {
    // SAFETY: the caller vouches for the source.
    unsafe {
        if left >= S::LANES {
            s.load(x.cast())
        } else if left > 0 {
            s.load_first(x.cast(), left)
        } else {
            s.splat(0)
        }
    }
}

/// Encodes a block of four lines that are contiguous, into a panel. Returns whether it needs the general product.
///
/// # Safety
/// - each of `x` is valid for reading `n` elements, 0 < n ≤ 4 · steps;
/// - each of `random` is valid for reading `n + ROW_PADDING` elements if `R` is stochastic, else unused;
/// - `place` is valid for writing 16 bytes (32 for wide codes) at every step, and its ends for 16 (right) or 32.
#[inline(always)]
pub(crate) unsafe fn encode_rows<S: Simd, const R: u8>(
    s: S,
    x: &[*const f32; 4],
    n: usize,
    random: &[*const u16; 4],
    coding: &PanelCoding,
    place: &BlockPlace,
) -> bool {
    // SAFETY: the caller's word.
    unsafe {
        match coding.correction {
            None => rows_of_side::<S, R, RIGHT>(s, x, n, random, coding, place),
            Some(Correction::Wide) => rows_of_side::<S, R, WIDE>(s, x, n, random, coding, place),
            Some(_) => rows_of_side::<S, R, LEFT>(s, x, n, random, coding, place),
        }
    }
}

/// [`encode_rows`] for one side.
///
/// # Safety
/// As for [`encode_rows`].
#[inline(always)]
unsafe fn rows_of_side<S: Simd, const R: u8, const SIDE: u8>(
    s: S,
    x: &[*const f32; 4],
    n: usize,
    random: &[*const u16; 4],
    coding: &PanelCoding,
    place: &BlockPlace,
) -> bool {
    let whole = n == 4 * place.steps;
    // SAFETY: the caller's word.
    unsafe {
        if whole && n.is_multiple_of(4 * S::LANES) {
            rows::<S, R, SIDE, true, 4>(s, x, n, random, coding, Target::Panel(place))
        } else if whole && n.is_multiple_of(2 * S::LANES) {
            rows::<S, R, SIDE, true, 2>(s, x, n, random, coding, Target::Panel(place))
        } else if whole && n.is_multiple_of(S::LANES) {
            rows::<S, R, SIDE, true, 1>(s, x, n, random, coding, Target::Panel(place))
        } else {
            rows::<S, R, SIDE, false, 4>(s, x, n, random, coding, Target::Panel(place))
        }
    }
}

/// Whether [`encode_lines`] takes blocks of `n` elements at a level of so many lanes.
pub(crate) const fn encodes_lines(n: usize, lanes: usize, correction: Correction) -> bool {
    n.is_multiple_of(lanes) && !matches!(correction, Correction::Wide)
}

/// A block of each of several lines, and where what becomes of it goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LineRun {
    pub(crate) lines: usize,
    pub(crate) x: *const f32,
    pub(crate) random: *const u16,
    /// Elements from a line to the next, random bits likewise.
    pub(crate) stride: usize,
    pub(crate) to: *mut u8,
    /// Bytes from a line to the next.
    pub(crate) pitch: usize,
}

/// Encodes a block of `n` elements of each line as codes, correction, rider. Returns whether one of them needs the general
/// product.
///
/// # Safety
/// - [`encodes_lines`]; the coding is that of a left operand; there are lines, and 0 < n;
/// - `of.x` is valid for reading these blocks;
/// - so is `of.random`, if `R` is stochastic, with `ROW_PADDING` elements behind them; else it is unused;
/// - `of.to` is valid for writing each line's block.
#[inline(always)]
pub(crate) unsafe fn encode_lines<S: Simd, const R: u8>(s: S, of: &LineRun, n: usize, coding: &PanelCoding) -> bool {
    let LineRun { lines, stride, pitch, .. } = *of;
    let mut general = false;
    for line in (0..lines).step_by(4) {
        // In place of lines past the last one, that one again.
        let at = [line, (line + 1).min(lines - 1), (line + 2).min(lines - 1), (line + 3).min(lines - 1)];
        let x = at.map(|at| of.x.wrapping_add(at * stride));
        let random = if R == STOCHASTIC { at.map(|at| of.random.wrapping_add(at * stride)) } else { [of.random; 4] };
        let to = Target::Lines(at.map(|at| of.to.wrapping_add(at * pitch)));
        // SAFETY: the caller's word.
        general |= unsafe {
            if n.is_multiple_of(4 * S::LANES) {
                rows::<S, R, LEFT, true, 4>(s, &x, n, &random, coding, to)
            } else if n.is_multiple_of(2 * S::LANES) {
                rows::<S, R, LEFT, true, 2>(s, &x, n, &random, coding, to)
            } else {
                rows::<S, R, LEFT, true, 1>(s, &x, n, &random, coding, to)
            }
        };
    }
    general
}

/// Where a block of four lines goes.
#[derive(Clone, Copy)]
enum Target<'a> {
    Panel(&'a BlockPlace),
    /// Codes, correction and rider of each line.
    Lines([*mut u8; 4]),
}

/// Stores four lines, each `REGISTERS` registers of codes: given by lines, or if it is one register each, as the panel's
/// `word`.
///
/// # Safety
/// `to` is valid for writing `REGISTERS * LANES` codes each.
#[inline(always)]
unsafe fn store_lines<S: Simd, const REGISTERS: usize>(s: S, word: S::V, lines: [S::V; 4], to: [*mut u8; 4]) {
    let len = REGISTERS * S::LANES;
    let mut codes = [0u8; 4 * 16];
    // SAFETY: a register has at most 64 bytes; the caller vouches for the lines.
    unsafe {
        if REGISTERS == 1 {
            s.store(codes.as_mut_ptr().cast(), s.unzip_words(word));
            for (l, to) in to.into_iter().enumerate() {
                std::ptr::copy_nonoverlapping(codes.as_ptr().add(l * len), to, len);
            }
            return;
        }
        for (line, to) in lines.into_iter().zip(to) {
            if REGISTERS == 4 {
                s.store(to.cast(), s.unzip_words(line));
            } else {
                s.store(codes.as_mut_ptr().cast(), s.unzip_words(line));
                std::ptr::copy_nonoverlapping(codes.as_ptr(), to, len);
            }
        }
    }
}

/// [`encode_rows`] by `REGISTERS` of a line at a time. `FULL`: the block is whole and a multiple of that, as it is for
/// lines.
///
/// # Safety
/// As for [`encode_rows`], or [`encode_lines`].
#[inline(always)]
unsafe fn rows<S: Simd, const R: u8, const SIDE: u8, const FULL: bool, const REGISTERS: usize>(
    s: S,
    x: &[*const f32; 4],
    n: usize,
    random: &[*const u16; 4],
    coding: &PanelCoding,
    target: Target<'_>,
) -> bool {
    let chunks = S::LANES / 4;
    // A short block's last steps are zeros.
    let steps = match target {
        Target::Panel(place) => place.steps,
        Target::Lines(_) => n / 4,
    };
    let run = REGISTERS * S::LANES;
    // SAFETY: reads stay inside n by `load_up_to`, or inside the random bits' padding; steps past the last one are
    // written to a copy.
    unsafe {
        let magnitude = s.splat(MAGNITUDE);
        let mut top = [s.splat(0); 4];
        let mut i = 0;
        while i < n {
            for (&x, top) in x.iter().zip(&mut top) {
                // The line's next block but one; four lines at a time are too many for the hardware to follow alone.
                for line in (0..run).step_by(16) {
                    s.prefetch(x.wrapping_add(i + AHEAD + line));
                }
                let mut m = [s.splat(0); 4];
                for (j, m) in m.iter_mut().enumerate().take(REGISTERS) {
                    let at = i + j * S::LANES;
                    let v = if FULL {
                        s.load(x.add(at).cast())
                    } else {
                        load_up_to(s, x.wrapping_add(at), n.saturating_sub(at))
                    };
                    *m = s.and(v, magnitude);
                }
                *top = s.max_i32(*top, s.max_i32(s.max_i32(m[0], m[1]), s.max_i32(m[2], m[3])));
            }
            i += run;
        }
        let Scales { scale, keep, general } = scales(s, s.max_of_4(top), coding);
        let inverse = inverses(s, scale);
        let inverse = [
            s.splat_in_chunks::<0>(inverse),
            s.splat_in_chunks::<1>(inverse),
            s.splat_in_chunks::<2>(inverse),
            s.splat_in_chunks::<3>(inverse),
        ];
        let (limit, minus) =
            (s.splat(coding.limit * 0x0101_0101), s.splat(((256 - coding.limit) as u32 * 0x0101_0101) as i32));
        let minus_offset = minus_offset(s, coding);
        let mut sums = CodeSums { halves: s.splat(0), total: s.splat(0) };
        let mut step = 0;
        while step < steps {
            let i = 4 * step;
            // The first register of each line, and the lines.
            let (mut firsts, mut lines) = ([s.splat(0); 4], [s.splat(0); 4]);
            for l in 0..4 {
                let mut q = [s.splat(0); 4];
                for (j, q) in q.iter_mut().enumerate().take(REGISTERS) {
                    let at = i + j * S::LANES;
                    if FULL || at < n {
                        let r = if R == STOCHASTIC { s.load_u16(random[l].add(at)) } else { s.splat(0) };
                        let v = if FULL { s.load(x[l].add(at).cast()) } else { load_up_to(s, x[l].add(at), n - at) };
                        // Codes past the end are zero: RNE(0) + r < 2^16.
                        *q = round::<S, R>(s, s.mul_f32(v, inverse[l]), r);
                    }
                }
                if REGISTERS == 1 {
                    firsts[l] = q[0];
                } else {
                    lines[l] = s.max_i8(s.min_i8(s.pack_words(q), limit), minus);
                }
            }
            let mut words = if REGISTERS == 1 {
                // Four registers, each a line: their words come together as they are packed.
                let words = s.max_i8(s.min_i8(s.pack_words(firsts), limit), minus);
                [words, s.splat(0), s.splat(0), s.splat(0)]
            } else {
                s.transpose_words(lines)
            };
            if let Some(keep) = keep {
                for word in &mut words {
                    *word = s.and(*word, keep);
                }
            }
            if SIDE != RIGHT {
                add_codes(s, &mut sums, words, minus_offset);
            }
            let place = match target {
                Target::Panel(place) => place,
                Target::Lines(to) => {
                    // Of NaN blocks the exponent alone counts.
                    store_lines::<S, REGISTERS>(s, words[0], lines, to.map(|line| line.wrapping_add(i)));
                    step += run / 4;
                    continue;
                }
            };
            for (j, word) in words.into_iter().enumerate().take(REGISTERS) {
                let first = step + j * chunks;
                if FULL || first + chunks <= place.steps {
                    store_codes::<S, SIDE>(s, coding, word, place.codes.add(first * place.step), place.step);
                } else if first < place.steps {
                    let bytes = if SIDE == WIDE { 32 } else { 16 };
                    let mut copy = [0u8; 4 * 32];
                    store_codes::<S, SIDE>(s, coding, word, copy.as_mut_ptr(), bytes);
                    for c in 0..place.steps - first {
                        let to = place.codes.add((first + c) * place.step);
                        std::ptr::copy_nonoverlapping(copy.as_ptr().add(c * bytes), to, bytes);
                    }
                }
            }
            step += run / 4;
        }
        let rider = s.shl::<23>(scale);
        // Chunks have counted different steps.
        let sums = CodeSums { halves: s.sum_chunks_i16(sums.halves), total: s.sum_chunks(sums.total) };
        match target {
            Target::Panel(place) if SIDE == RIGHT => s.store_chunk(place.ends, s.add(rider, s.splat(RIDER))),
            Target::Panel(place) => {
                s.store_chunk(place.ends, correction(s, sums, rider, coding));
                s.store_chunk(place.ends.add(16), rider);
            }
            Target::Lines(lines) => {
                let mut ends = [[0u32; 4]; 2];
                s.store_chunk(ends[0].as_mut_ptr().cast(), correction(s, sums, rider, coding));
                s.store_chunk(ends[1].as_mut_ptr().cast(), rider);
                for (l, line) in lines.into_iter().enumerate() {
                    line.add(n).cast::<[u32; 2]>().write_unaligned([ends[0][l], ends[1][l]]);
                }
            }
        }
        general
    }
}

/// Codes of `n` contiguous elements as i16.
///
/// # Safety
/// - `x` is valid for reading `n` elements;
/// - `random` is valid for reading `n + ROW_PADDING` elements if `R` is stochastic, else unused;
/// - `out` is valid for writing `n + ROW_PADDING` i16.
#[inline(always)]
pub(crate) unsafe fn round_row_i16<S: Simd, const R: u8>(
    s: S,
    x: *const f32,
    n: usize,
    scaling: Scaling,
    random: *const u16,
    out: *mut i16,
) {
    // SAFETY: full chunks are inside n; the last one reads a padded copy, and writes within the padding.
    unsafe {
        let chunk = 2 * S::LANES;
        let (inverse, limit) = (s.splat_f32(scaling.inverse), s.splat_f32(scaling.limit));
        let minus = s.splat_f32(-scaling.limit);
        let mut i = 0;
        while i < n {
            let tail;
            let mut p = x.add(i);
            if i + chunk > n {
                tail = padded_tail(p, n - i);
                p = tail.as_ptr();
            }
            let mut q = [s.splat(0); 2];
            for (j, q) in q.iter_mut().enumerate() {
                let r = if R == STOCHASTIC { s.load_u16(random.add(i + j * S::LANES)) } else { s.splat(0) };
                *q = code::<S, R>(s, s.load(p.add(j * S::LANES).cast()), inverse, limit, minus, r);
            }
            s.store_i16x2(out.add(i), q);
            i += chunk;
        }
    }
}

/// Values q · `scale` of `n` contiguous elements, scale = 2^s. `out` may be `x`.
///
/// # Safety
/// - `x` is valid for reading and `out` for writing `n` elements; they are equal or do not overlap;
/// - `random` is valid for reading `n + ROW_PADDING` elements if `R` is stochastic, else unused.
#[inline(always)]
pub(crate) unsafe fn quantize_row<S: Simd, const R: u8>(
    s: S,
    x: *const f32,
    n: usize,
    scaling: Scaling,
    scale: f32,
    random: *const u16,
    out: *mut f32,
) {
    // SAFETY: full registers are inside n; the last one goes through padded copies.
    unsafe {
        let (inverse, limit) = (s.splat_f32(scaling.inverse), s.splat_f32(scaling.limit));
        let minus = s.splat_f32(-scaling.limit);
        let scale = s.splat_f32(scale);
        let mut i = 0;
        while i + S::LANES <= n {
            let r = if R == STOCHASTIC { s.load_u16(random.add(i)) } else { s.splat(0) };
            let q = code::<S, R>(s, s.load(x.add(i).cast()), inverse, limit, minus, r);
            s.store(out.add(i).cast(), s.mul_f32(s.to_f32(q), scale));
            i += S::LANES;
        }
        if i < n {
            let mut tail = padded_tail(x.add(i), n - i);
            let r = if R == STOCHASTIC { s.load_u16(random.add(i)) } else { s.splat(0) };
            let q = code::<S, R>(s, s.load(tail.as_ptr().cast()), inverse, limit, minus, r);
            s.store(tail.as_mut_ptr().cast(), s.mul_f32(s.to_f32(q), scale));
            std::ptr::copy_nonoverlapping(tail.as_ptr(), out.add(i), n - i);
        }
    }
}

/// Copies `n` rows of `lines` lines that lie side by side into `staging`, one strip after the other, zeros after the last
/// line, and takes the largest |x| of every line, as bits.
///
/// # Safety
/// - row k, `x + k * stride`, is valid for reading `lines` elements, k < `n`; they make up to [`STRIPS_STAGED`] strips;
/// - `staging` is valid for writing `between` elements a strip, n · STRIP ≤ `between`, and `amax` for `STRIP`.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "a rectangle, and where it goes")]
pub(crate) unsafe fn stage_strips<S: Simd>(
    s: S,
    x: *const f32,
    stride: isize,
    n: usize,
    lines: usize,
    staging: *mut f32,
    between: usize,
    amax: *mut i32,
) {
    let strips = lines.div_ceil(STRIP);
    debug_assert!(strips <= STRIPS_STAGED && n * STRIP <= between);
    // SAFETY: STRIP is a multiple of LANES; all accesses are inside the rows the caller vouches for.
    unsafe {
        let magnitude = s.splat(MAGNITUDE);
        let mut m = [[s.splat(0); STRIP / 8]; STRIPS_STAGED];
        for k in 0..n {
            let row = x.offset(k as isize * stride);
            if lines.is_multiple_of(STRIP) {
                for (strip, m) in m.iter_mut().enumerate().take(strips) {
                    let row = row.add(strip * STRIP);
                    // Those beside these come next.
                    s.prefetch(row.wrapping_add(strips * STRIP));
                    s.prefetch(row.wrapping_add(strips * STRIP + 16));
                    for (v, m) in m.iter_mut().enumerate().take(STRIP / S::LANES) {
                        let x = s.load(row.add(v * S::LANES).cast());
                        s.store(staging.add(strip * between + k * STRIP + v * S::LANES).cast(), x);
                        *m = s.max_i32(*m, s.and(x, magnitude));
                    }
                }
            } else {
                for (strip, m) in m.iter_mut().enumerate().take(strips) {
                    for (v, m) in m.iter_mut().enumerate().take(STRIP / S::LANES) {
                        let line = strip * STRIP + v * S::LANES;
                        let x = load_up_to(s, row.wrapping_add(line), lines.saturating_sub(line));
                        s.store(staging.add(strip * between + k * STRIP + v * S::LANES).cast(), x);
                        *m = s.max_i32(*m, s.and(x, magnitude));
                    }
                }
            }
        }
        for (strip, m) in m.iter().enumerate().take(strips) {
            for (v, m) in m.iter().enumerate().take(STRIP / S::LANES) {
                s.store(amax.add(strip * STRIP + v * S::LANES), *m);
            }
        }
    }
}

/// Encodes a block of a strip of lines that lie side by side. Bit v of the result: whether lines v · LANES … need the
/// general product.
///
/// # Safety
/// - `staging` and (if `R` is stochastic) `random` are valid for reading `4 * steps * STRIP` elements, rows past the
///   block's end are zero;
/// - `amax` is valid for reading `STRIP` bit patterns;
/// - each of the `places`, up to STRIP / LANES, is valid for writing its chunks at every step, and its ends.
#[inline(always)]
pub(crate) unsafe fn encode_strip<S: Simd, const R: u8>(
    s: S,
    staging: *const f32,
    random: *const u16,
    amax: *const i32,
    coding: &PanelCoding,
    places: &[BlockPlace],
) -> u32 {
    // SAFETY: the caller's word.
    unsafe {
        match coding.correction {
            None => strip::<S, R, RIGHT>(s, staging, random, amax, coding, places),
            Some(Correction::Wide) => strip::<S, R, WIDE>(s, staging, random, amax, coding, places),
            Some(_) => strip::<S, R, LEFT>(s, staging, random, amax, coding, places),
        }
    }
}

/// [`encode_strip`] for one side.
///
/// # Safety
/// As for [`encode_strip`].
#[inline(always)]
unsafe fn strip<S: Simd, const R: u8, const SIDE: u8>(
    s: S,
    staging: *const f32,
    random: *const u16,
    amax: *const i32,
    coding: &PanelCoding,
    places: &[BlockPlace],
) -> u32 {
    let mut general = 0;
    // SAFETY: v < STRIP and 4 t + 3 < 4 steps keep every access inside what the caller vouches for.
    unsafe {
        let (limit, minus) =
            (s.splat(coding.limit * 0x0101_0101), s.splat(((256 - coding.limit) as u32 * 0x0101_0101) as i32));
        let minus_offset = minus_offset(s, coding);
        for (group, place) in places.iter().enumerate() {
            let v = group * S::LANES;
            let scales = scales(s, s.load(amax.add(v)), coding);
            general |= u32::from(scales.general) << group;
            let inverse = inverses(s, scales.scale);
            let mut sums = CodeSums { halves: s.splat(0), total: s.splat(0) };
            for t in 0..place.steps {
                let mut q = [s.splat(0); 4];
                for (j, q) in q.iter_mut().enumerate() {
                    let at = (4 * t + j) * STRIP + v;
                    let r = if R == STOCHASTIC { s.load_u16(random.add(at)) } else { s.splat(0) };
                    *q = round::<S, R>(s, s.mul_f32(s.load(staging.add(at).cast()), inverse), r);
                }
                let mut word = s.max_i8(s.min_i8(s.interleave_bytes(q), limit), minus);
                if let Some(keep) = scales.keep {
                    word = s.and(word, keep);
                }
                if SIDE != RIGHT {
                    let pairs = s.mul_pairs(s.splat(0x0101_0101), word);
                    sums.halves = s.add_i16(sums.halves, pairs);
                    sums.total = s.add(sums.total, s.mul_halves(pairs, minus_offset));
                }
                store_codes::<S, SIDE>(s, coding, word, place.codes.add(t * place.step), place.chunk);
            }
            let rider = s.shl::<23>(scales.scale);
            if SIDE == RIGHT {
                s.store_chunks(place.ends, place.chunk, s.add(rider, s.splat(RIDER)));
            } else {
                s.store_chunks(place.ends, place.chunk, correction(s, sums, rider, coding));
                s.store_chunks(place.ends.add(16), place.chunk, rider);
            }
        }
    }
    general
}
