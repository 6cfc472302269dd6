//! Convolutions whose groups have 1, 2, 4 or 8 channels on either side. No panel of such a group would fill a tile: here a
//! lane is a channel, of as many groups as fit a register, and lanes of a group find each other by [`Simd::exchange`].
//!
//! Lane l of group channel j has products with lanes l ^ r for every r below the group's channels; *kernel words* hold
//! what belongs there. A word is four codes, of the right operand signed, of the left one raised by 128 (8 in nibbles).
//!
//! # Layout
//! ```text
//! patch kernel    for each register of channels and block  i32 −128 Σ codes, f32 2^eb, [quads of taps][r] words of four taps
//! pixel kernel    for each register of channels and tap    i32 −128 Σ codes, f32 2^eb, one or two words: r = 0..4, 4..8
//! pixels          for each register of channels and pixel  a word of r = 0..4, i32 ea << 23
//! columns         for each register of channels and pixel  blocks of [quads of samples] words (two quads a word if
//!                                                          nibbles, the first one low), then u8 exponents + 127
//! ```
//!
//! # Ceiling
//! On two ports, for a register of channels and nine taps: a patch takes 18 operations for its largest magnitude, 12 for
//! scales, 18 to scale and round, 18 to pack and 3 products for each of a group's channels, 36 cycles; encoded pixels take 4
//! operations a tap, 18 cycles. A weight gradient takes one product for each quad of samples and channel of a group, and 4
//! operations to add each sum. What is read and written once, 192 bytes a register, takes 13 to 20 ns of memory.

use super::encode::{Limits, PanelCoding, STOCHASTIC, Scales, inverses, load_up_to, round, scales};
use crate::arch::simd::Simd;
use crate::format::{EXPONENT_OFFSET, MAX_BLOCK};
use std::mem::MaybeUninit;

/// What left operands' codes are raised by in bytes, and in nibbles.
pub(crate) const RAISED: i32 = 128;
const RAISED_NIBBLE: i32 = 8;
const MAGNITUDE: i32 = i32::MAX;
/// Elements by which reading samples is ahead of encoding.
const AHEAD: usize = 64;
/// Elements by which the last tap's pixels are asked for ahead.
const PATCHES_AHEAD: usize = 256;
/// Elements by which pixels are asked for ahead.
const PIXELS_AHEAD: usize = 1024;
/// Pixels that are multiplied side by side, for the kernel's words to be loaded once.
const TOGETHER: usize = 4;

/// Whether groups of so many channels are narrow.
pub(crate) const fn is_narrow(channels: usize) -> bool {
    matches!(channels, 1 | 2 | 4 | 8)
}

/// Words of a block of a patch kernel.
pub(crate) const fn patch_block(lanes: usize, taps: usize, group: usize) -> usize {
    lanes * (2 + taps.div_ceil(4) * group)
}

/// Words of a tap of a pixel kernel.
pub(crate) const fn pixel_tap(lanes: usize, group: usize) -> usize {
    lanes * (2 + group.div_ceil(4))
}

/// Words of a pixel.
pub(crate) const fn pixel_words(lanes: usize) -> usize {
    2 * lanes
}

/// Whether [`Simd::dot4_small`] is exact for left codes raised by `raised`.
pub(crate) const fn is_small(raised: i32, left_max: i32, right_max: i32) -> bool {
    2 * (raised + left_max) * right_max < 1 << 15
}

/// The lanes' byte in every place.
#[inline(always)]
fn bytes<S: Simd>(s: S, byte: i32) -> S::V {
    s.splat((byte as u32 * 0x0101_0101) as i32)
}

#[inline(always)]
fn dot<S: Simd>(s: S, sums: S::V, raised: S::V, signed: S::V, small: bool) -> S::V {
    if small { s.dot4_small(sums, raised, signed) } else { s.dot4(sums, raised, signed) }
}

/// Lane l ^ r in lane l.
#[inline(always)]
fn exchanged<S: Simd>(s: S, v: S::V, r: usize) -> S::V {
    let v = if r & 4 != 0 { s.exchange::<4>(v) } else { v };
    let v = if r & 2 != 0 { s.exchange::<2>(v) } else { v };
    if r & 1 != 0 { s.exchange::<1>(v) } else { v }
}

/// Up to LANES elements, of which `left` exist; all of them do where it is known that they are `FULL`.
///
/// # Safety
/// As many are valid for reading.
#[inline(always)]
unsafe fn load<S: Simd, const FULL: bool>(s: S, x: *const f32, left: usize) -> S::V {
    // SAFETY: the caller's word.
    unsafe { if FULL { s.load(x.cast()) } else { s.load_first(x.cast(), left) } }
}

/// The same lanes back; whole registers around the caches or not.
///
/// # Safety
/// As many are valid for writing, and on a cache line if they go around them.
#[inline(always)]
unsafe fn store<S: Simd, const FULL: bool>(s: S, to: *mut f32, left: usize, v: S::V, around: bool) {
    // SAFETY: the caller's word.
    unsafe {
        match (FULL, around) {
            (true, true) => s.store_around(to.cast(), v),
            (true, false) => s.store(to.cast(), v),
            (false, _) => s.store_first(to.cast(), left, v),
        }
    }
}

/// The largest lane of each group.
#[inline(always)]
fn group_max<S: Simd>(s: S, v: S::V, group: usize) -> S::V {
    let v = if group > 1 { s.max_i32(v, s.exchange::<1>(v)) } else { v };
    let v = if group > 2 { s.max_i32(v, s.exchange::<2>(v)) } else { v };
    if group > 4 { s.max_i32(v, s.exchange::<4>(v)) } else { v }
}

/// Patches of the pixels of one row of an image, or of several.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patches<'a> {
    pub(crate) image: *const f32,
    /// As many zeros as a pixel has channels.
    pub(crate) zeros: *const f32,
    pub(crate) channels: usize,
    pub(crate) group: usize,
    /// For every pixel and tap the image's pixel, negative for none.
    pub(crate) sources: &'a [i32],
    pub(crate) taps: usize,
    /// Taps of a block.
    pub(crate) together: usize,
    pub(crate) kernel: *const i32,
    pub(crate) small: bool,
    /// Random bits of the first pixel's patches, [taps, channels], if there is but one.
    pub(crate) random: *const u16,
    /// Null: none.
    pub(crate) bias: *const f32,
    pub(crate) out: *mut f32,
    /// Whether `out`, made of whole registers on cache lines, is written around the caches, up to a fence.
    pub(crate) around: bool,
}

/// Flattened patches of all groups, encoded and multiplied by their kernels: `out` ← Σ over blocks. Returns whether a block
/// needs the general product; `out` is unspecified then.
///
/// # Safety
/// - the image's pixels that sources name are valid for reading, so are the zeros, the kernel and, if there is one, the bias;
/// - so are the random bits if `R` is stochastic, for LANES − 1 elements more;
/// - `out` is valid for writing the channels of every pixel; `found` has room for the taps, of which there are some.
#[inline(always)]
pub(crate) unsafe fn patches<S: Simd, const R: u8>(
    s: S,
    of: &Patches<'_>,
    coding: &PanelCoding,
    found: &mut [*const f32],
) -> bool {
    let (channels, taps) = (of.channels, of.taps);
    let register_words = taps.div_ceil(of.together) * patch_block(S::LANES, of.together, of.group);
    let whole = channels / S::LANES * S::LANES;
    let mut general = false;
    // SAFETY: the caller's word.
    unsafe {
        for (pixel, sources) in of.sources.chunks_exact(taps).enumerate() {
            for (to, &source) in found.iter_mut().zip(sources) {
                *to = if source < 0 { of.zeros } else { of.image.add(source as usize * channels) };
            }
            let found = &found[..taps];
            let (mut kernel, out) = (of.kernel, of.out.add(pixel * channels));
            for first in (0..whole).step_by(S::LANES) {
                s.prefetch(found[taps - 1].wrapping_add(first + PATCHES_AHEAD));
                general |= patch::<S, R, true>(s, of, coding, found, kernel, first, out);
                kernel = kernel.add(register_words);
            }
            if whole < channels {
                general |= patch::<S, R, false>(s, of, coding, found, kernel, whole, out);
            }
        }
    }
    general
}

/// A register of one pixel's patches, from channel `first` on. `FULL`: there are channels for all of it.
///
/// # Safety
/// As for [`patches`].
#[inline(always)]
unsafe fn patch<S: Simd, const R: u8, const FULL: bool>(
    s: S,
    of: &Patches<'_>,
    coding: &PanelCoding,
    found: &[*const f32],
    mut kernel: *const i32,
    first: usize,
    out: *mut f32,
) -> bool {
    let (limits, magnitude, raise) = (Limits::new(s, coding), s.splat(MAGNITUDE), bytes(s, RAISED));
    let left = of.channels - first;
    let mut general = false;
    let mut sum = s.splat(0);
    // SAFETY: the caller's word.
    unsafe {
        for (block, found) in found.chunks(of.together).enumerate() {
            let mut top = s.splat(0);
            for x in found {
                top = s.max_i32(top, s.and(load::<S, FULL>(s, x.add(first), left), magnitude));
            }
            let Scales { scale, general: outside, .. } = scales(s, group_max(s, top, of.group), coding);
            general |= outside;
            let inverse = inverses(s, scale);
            let mut sums = s.load(kernel);
            let mut words = kernel.add(2 * S::LANES);
            let random = of.random.wrapping_add(block * of.together * of.channels + first);
            let (quads, rest) = found.as_chunks::<4>();
            for (quad, x) in quads.iter().enumerate() {
                let random = random.wrapping_add(4 * quad * of.channels);
                let mut q = [s.splat(0); 4];
                for (j, q) in q.iter_mut().enumerate() {
                    let bits = random_lanes::<S, R>(s, random.wrapping_add(j * of.channels));
                    *q = round::<S, R>(s, s.mul_f32(load::<S, FULL>(s, x[j].add(first), left), inverse), bits);
                }
                let word = s.xor(limits.apply(s, s.interleave_bytes(q)), raise);
                sums = add_word(s, sums, word, words, of);
                words = words.add(of.group * S::LANES);
            }
            if !rest.is_empty() {
                let random = random.wrapping_add(4 * quads.len() * of.channels);
                let mut q = [s.splat(0); 4];
                for (j, (q, x)) in q.iter_mut().zip(rest).enumerate() {
                    let bits = random_lanes::<S, R>(s, random.wrapping_add(j * of.channels));
                    *q = round::<S, R>(s, s.mul_f32(load::<S, FULL>(s, x.add(first), left), inverse), bits);
                }
                let word = s.xor(limits.apply(s, s.interleave_bytes(q)), raise);
                sums = add_word(s, sums, word, words, of);
            }
            let scale = s.add(s.load(kernel.add(S::LANES)), s.shl::<23>(scale));
            sum = s.mul_add_f32(s.to_f32(sums), scale, sum);
            kernel = kernel.add(patch_block(S::LANES, of.together, of.group));
        }
        if !of.bias.is_null() {
            sum = s.add_f32(sum, load::<S, FULL>(s, of.bias.add(first), left));
        }
        store::<S, FULL>(s, out.add(first), left, sum, of.around);
    }
    general
}

/// Random bits of a register, where rounding takes any.
///
/// # Safety
/// As many are valid for reading then.
#[inline(always)]
unsafe fn random_lanes<S: Simd, const R: u8>(s: S, random: *const u16) -> S::V {
    // SAFETY: the caller's word.
    if R == STOCHASTIC { unsafe { s.load_u16(random) } } else { s.splat(0) }
}

/// Adds a word of the left operand times the kernel's, one for each of a group's channels.
///
/// # Safety
/// `words` is valid for reading them.
#[inline(always)]
unsafe fn add_word<S: Simd>(s: S, sums: S::V, word: S::V, words: *const i32, of: &Patches<'_>) -> S::V {
    // SAFETY: the caller's word.
    unsafe {
        match of.group {
            1 => add_words::<S, 1>(s, sums, word, words, of.small),
            2 => add_words::<S, 2>(s, sums, word, words, of.small),
            4 => add_words::<S, 4>(s, sums, word, words, of.small),
            _ => add_words::<S, 8>(s, sums, word, words, of.small),
        }
    }
}

/// [`add_word`] of groups of `C` channels.
///
/// # Safety
/// As for [`add_word`].
#[inline(always)]
unsafe fn add_words<S: Simd, const C: usize>(s: S, mut sums: S::V, word: S::V, words: *const i32, small: bool) -> S::V {
    for r in 0..C {
        // SAFETY: the caller's word.
        sums = dot(s, sums, exchanged(s, word, r), unsafe { s.load(words.add(S::LANES * r)) }, small);
    }
    sums
}

/// Pixels to be encoded, each along the channels of its groups.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pixels {
    pub(crate) count: usize,
    /// The first pixel's first channel, elements from a pixel to the next, and how many channels are taken.
    pub(crate) x: *const f32,
    pub(crate) stride: usize,
    pub(crate) channels: usize,
    pub(crate) group: usize,
    /// Random bits, [pixels, channels].
    pub(crate) random: *const u16,
    /// Where the first pixel goes, and words from a register's pixels to the next one's.
    pub(crate) to: *mut i32,
    pub(crate) pitch: usize,
}

/// Encodes pixels. Returns whether a block needs the general product.
///
/// # Safety
/// The pixels' channels are valid for reading, `to` for writing every register's pixels, and if `R` is stochastic the random
/// bits for reading, with LANES − 1 elements more.
#[inline(always)]
pub(crate) unsafe fn encode_pixels<S: Simd, const R: u8>(s: S, of: &Pixels, coding: &PanelCoding) -> bool {
    let whole = of.channels / S::LANES * S::LANES;
    let mut general = false;
    for pixel in 0..of.count {
        for first in (0..whole).step_by(S::LANES) {
            // SAFETY: the caller's word.
            general |= unsafe { encode_register::<S, R, true>(s, of, coding, pixel, first) };
        }
        if whole < of.channels {
            // SAFETY: the caller's word.
            general |= unsafe { encode_register::<S, R, false>(s, of, coding, pixel, whole) };
        }
    }
    general
}

/// A register of one pixel, from channel `first` on. `FULL`: there are channels for all of it.
///
/// # Safety
/// As for [`encode_pixels`].
#[inline(always)]
unsafe fn encode_register<S: Simd, const R: u8, const FULL: bool>(
    s: S,
    of: &Pixels,
    coding: &PanelCoding,
    pixel: usize,
    first: usize,
) -> bool {
    // SAFETY: the caller's word.
    unsafe {
        let x = of.x.add(pixel * of.stride + first);
        s.prefetch(x.wrapping_add(PIXELS_AHEAD));
        let v = load::<S, FULL>(s, x, of.channels - first);
        let top = group_max(s, s.and(v, s.splat(MAGNITUDE)), of.group);
        let Scales { scale, general, .. } = scales(s, top, coding);
        let bits = random_lanes::<S, R>(s, of.random.wrapping_add(pixel * of.channels + first));
        let q = round::<S, R>(s, s.mul_f32(v, inverses(s, scale)), bits);
        let q = Limits::new(s, coding).apply(s, s.interleave_bytes([q, s.splat(0), s.splat(0), s.splat(0)]));
        let mut word = s.xor(s.and(q, s.splat(0xFF)), s.splat(RAISED));
        if of.group > 1 {
            word = s.or(word, s.shl::<8>(s.exchange::<1>(word)));
        }
        if of.group > 2 {
            word = s.or(word, s.shl::<16>(s.exchange::<2>(word)));
        }
        let to = of.to.add(first / S::LANES * of.pitch + pixel * pixel_words(S::LANES));
        s.store(to, word);
        s.store(to.add(S::LANES), s.shl::<23>(scale));
        general
    }
}

/// Writes a pixel of zeros, for taps that find none.
///
/// # Safety
/// `to` is valid for writing the words of a pixel.
#[inline(always)]
pub(crate) unsafe fn zero_pixel<S: Simd>(s: S, to: *mut i32) {
    // SAFETY: the caller's word.
    unsafe {
        s.store(to, bytes(s, RAISED));
        s.store(to.add(S::LANES), s.splat(0));
    }
}

/// What the taps of some pixels of the product find among encoded pixels, for one register of channels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meetings<'a> {
    pub(crate) pixels: *const i32,
    pub(crate) kernel: *const i32,
    pub(crate) group: usize,
    pub(crate) small: bool,
    /// Number of a pixel of zeros.
    pub(crate) none: usize,
    /// For every pixel and tap the encoded pixel, negative for none.
    pub(crate) sources: &'a [i32],
    pub(crate) taps: usize,
    /// Null: none.
    pub(crate) bias: *const f32,
    /// The first pixel's first channel, how many channels are left there, elements from a pixel to the next.
    pub(crate) out: *mut f32,
    pub(crate) left: usize,
    pub(crate) stride: usize,
    /// Whether `out`, made of whole registers on cache lines, is written around the caches, up to a fence.
    pub(crate) around: bool,
}

/// `out` ← Σ over taps of pixel · kernel.
///
/// # Safety
/// The pixels that sources name, and the one of zeros, the kernel's taps and, if there is one, the bias are valid for reading, `out` for writing the
/// channels that are left, up to LANES, of every pixel; there are taps.
#[inline(always)]
pub(crate) unsafe fn multiply_pixels<S: Simd>(s: S, of: &Meetings<'_>) {
    let left = of.left.min(S::LANES);
    // SAFETY: the caller's word.
    unsafe {
        let bias = if of.bias.is_null() { s.splat(0) } else { load_up_to(s, of.bias, left) };
        let pixels = of.sources.len() / of.taps;
        let whole = pixels / TOGETHER * TOGETHER;
        for pixel in (0..whole).step_by(TOGETHER) {
            multiply_some::<S, TOGETHER>(s, of, pixel, bias);
        }
        for pixel in whole..pixels {
            multiply_some::<S, 1>(s, of, pixel, bias);
        }
    }
}

/// `N` pixels from `pixel` on.
///
/// # Safety
/// As for [`multiply_pixels`].
#[inline(always)]
unsafe fn multiply_some<S: Simd, const N: usize>(s: S, of: &Meetings<'_>, pixel: usize, bias: S::V) {
    // SAFETY: the caller's word.
    unsafe {
        let mut sums = [s.splat(0); N];
        for tap in 0..of.taps {
            let kernel = of.kernel.add(tap * pixel_tap(S::LANES, of.group));
            let (start, scale) = (s.load(kernel), s.load(kernel.add(S::LANES)));
            let words = kernel.add(2 * S::LANES);
            for (i, sum) in sums.iter_mut().enumerate() {
                let source = *of.sources.get_unchecked((pixel + i) * of.taps + tap);
                let source = if source < 0 { of.none } else { source as usize };
                let from = of.pixels.add(source * pixel_words(S::LANES));
                let word = s.load(from);
                let mut products = dot(s, start, word, s.load(words), of.small);
                if of.group > 4 {
                    products = dot(s, products, s.exchange::<4>(word), s.load(words.add(S::LANES)), of.small);
                }
                *sum = s.mul_add_f32(s.to_f32(products), s.add(scale, s.load(from.add(S::LANES))), *sum);
            }
        }
        for (i, sum) in sums.into_iter().enumerate() {
            let sum = if of.bias.is_null() { sum } else { s.add_f32(sum, bias) };
            let to = of.out.add((pixel + i) * of.stride);
            if of.left >= S::LANES {
                store::<S, true>(s, to, of.left, sum, of.around);
            } else {
                store::<S, false>(s, to, of.left, sum, of.around);
            }
        }
    }
}

/// How the samples of a pixel lie, one register of channels wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ColumnLayout {
    pub(crate) samples: usize,
    /// Samples of a block.
    pub(crate) block: usize,
    pub(crate) nibbles: bool,
}

impl ColumnLayout {
    pub(crate) fn blocks(&self) -> usize {
        self.samples.div_ceil(self.block)
    }
    fn quads(&self) -> usize {
        self.block.div_ceil(4)
    }
    pub(crate) fn words(&self) -> usize {
        if self.nibbles { self.quads().div_ceil(2) } else { self.quads() }
    }
    pub(crate) fn block_bytes(&self, lanes: usize) -> usize {
        lanes * (4 * self.words() + 1)
    }
    /// Bytes of a pixel, for one register of channels.
    pub(crate) fn pixel_bytes(&self, lanes: usize) -> usize {
        self.blocks() * self.block_bytes(lanes)
    }
    pub(crate) fn raised(&self) -> i32 {
        if self.nibbles { RAISED_NIBBLE } else { RAISED }
    }
    /// Code of a sample of a lane.
    pub(crate) fn code(&self, pixel: &[u8], lanes: usize, lane: usize, sample: usize) -> i16 {
        let (block, i) = (sample / self.block, sample % self.block);
        let quad = i / 4;
        let word = if self.nibbles { quad / 2 } else { quad };
        let byte = pixel[block * self.block_bytes(lanes) + 4 * (word * lanes + lane) + i % 4];
        let code = match (self.nibbles, quad % 2) {
            (false, _) => byte,
            (true, 0) => byte & 15,
            (true, _) => byte >> 4,
        };
        i16::from(code) - self.raised() as i16
    }
    /// Exponent byte of a block of a lane.
    pub(crate) fn exponent(&self, pixel: &[u8], lanes: usize, lane: usize, block: usize) -> u8 {
        pixel[block * self.block_bytes(lanes) + 4 * lanes * self.words() + lane]
    }
}

/// The samples of a pixel's channels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Samples {
    /// The first sample's first channel, how many channels are left there, elements from a sample to the next.
    pub(crate) x: *const f32,
    pub(crate) left: usize,
    pub(crate) stride: usize,
    /// Random bits, which lie as the elements do.
    pub(crate) random: *const u16,
    pub(crate) layout: ColumnLayout,
}

/// Encodes the samples of up to LANES channels. Returns whether a block needs the general product.
///
/// # Safety
/// Every element is valid for reading, and so are, if `R` is stochastic, its random bits and LANES − 1 more; `to` is valid for
/// writing a pixel of the layout.
#[inline(always)]
pub(crate) unsafe fn encode_columns<S: Simd, const R: u8>(
    s: S,
    of: &Samples,
    coding: &PanelCoding,
    to: *mut u8,
) -> bool {
    // SAFETY: the caller's word.
    unsafe {
        if of.left >= S::LANES {
            columns::<S, R, true>(s, of, coding, to)
        } else {
            columns::<S, R, false>(s, of, coding, to)
        }
    }
}

/// [`encode_columns`]. `FULL`: there are channels for the whole register.
///
/// # Safety
/// As for [`encode_columns`].
#[inline(always)]
unsafe fn columns<S: Simd, const R: u8, const FULL: bool>(
    s: S,
    of: &Samples,
    coding: &PanelCoding,
    to: *mut u8,
) -> bool {
    let (limits, magnitude) = (Limits::new(s, coding), s.splat(MAGNITUDE));
    let Samples { x, left, stride, layout, .. } = *of;
    let mut general = false;
    // SAFETY: the caller's word.
    unsafe {
        for block in 0..layout.blocks() {
            let to = to.add(block * layout.block_bytes(S::LANES));
            let (first, end) = (block * layout.block, ((block + 1) * layout.block).min(layout.samples));
            let mut top = s.splat(0);
            for sample in first..end {
                let x = x.wrapping_add(sample * stride);
                s.prefetch(x.wrapping_add(AHEAD));
                top = s.max_i32(top, s.and(load::<S, FULL>(s, x, left), magnitude));
            }
            let Scales { scale, keep, general: outside } = scales(s, top, coding);
            general |= outside;
            let inverse = inverses(s, scale);
            let mut low = s.splat(0);
            for quad in 0..layout.words() * (1 + usize::from(layout.nibbles)) {
                let mut q = [s.splat(0); 4];
                for (j, q) in q.iter_mut().enumerate() {
                    let sample = first + 4 * quad + j;
                    if sample < end {
                        let bits = random_lanes::<S, R>(s, of.random.wrapping_add(sample * stride));
                        *q = round::<S, R>(
                            s,
                            s.mul_f32(load::<S, FULL>(s, x.add(sample * stride), left), inverse),
                            bits,
                        );
                    }
                }
                let word = limits.apply(s, s.interleave_bytes(q));
                let word = keep.map_or(word, |keep| s.and(word, keep));
                let word = s.xor(word, bytes(s, RAISED));
                if !layout.nibbles {
                    s.store(to.add(4 * S::LANES * quad).cast(), word);
                    continue;
                }
                // No byte is below 128 − 7.
                let word = s.sub(word, bytes(s, RAISED - RAISED_NIBBLE));
                if quad % 2 == 0 {
                    low = word;
                } else {
                    s.store(to.add(4 * S::LANES * (quad / 2)).cast(), s.or(low, s.shl::<4>(word)));
                }
            }
            let mut exponents = [0i32; 16];
            s.store(exponents.as_mut_ptr(), s.add(scale, s.splat(EXPONENT_OFFSET)));
            for (lane, &exponent) in exponents.iter().enumerate().take(S::LANES) {
                *to.add(4 * S::LANES * layout.words() + lane) = exponent as u8;
            }
        }
    }
    general
}

/// Some taps of a weight gradient, of one register of channels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sums<'a> {
    /// Pixels of X and of dY, and how they lie.
    pub(crate) x: *const u8,
    pub(crate) dy: *const u8,
    pub(crate) layouts: [ColumnLayout; 2],
    pub(crate) small: bool,
    /// For every pixel of dY and every tap the pixel of X, negative for none.
    pub(crate) sources: &'a [i32],
    pub(crate) taps: usize,
    /// The first of those that are summed up; sums, [taps, r, LANES], are of as many as there is room for.
    pub(crate) first: usize,
}

/// Signed words of a quad, or of two.
///
/// # Safety
/// `words` is valid for reading LANES words, `to` for writing LANES or twice as many.
#[inline(always)]
unsafe fn lower<S: Simd>(s: S, words: *const i32, nibbles: bool, to: *mut i32) {
    // SAFETY: the caller's word.
    unsafe {
        let (word, sign) = (s.load(words), bytes(s, RAISED));
        if nibbles {
            let (low, up) = (bytes(s, 15), bytes(s, RAISED - RAISED_NIBBLE));
            s.store(to, s.xor(s.add(s.and(word, low), up), sign));
            s.store(to.add(S::LANES), s.xor(s.add(s.and(s.sar::<4>(word), low), up), sign));
        } else {
            s.store(to, s.xor(word, sign));
        }
    }
}

/// `sums` + Σ over pixels and blocks of samples of X · dY, dY's channel j by X's channel j ^ r.
///
/// # Safety
/// Both are valid for reading the pixels that there are, of layouts of equal blocks up to [`MAX_BLOCK`]; `sums` has whole
/// taps of `C` registers, no more than there are from the first on.
#[inline(always)]
pub(crate) unsafe fn sum_pixels<S: Simd, const C: usize>(s: S, of: &Sums<'_>, sums: &mut [f32]) {
    let [xl, yl] = of.layouts;
    let (x_block, y_block) = (xl.block_bytes(S::LANES), yl.block_bytes(S::LANES));
    let (offset, one) = (s.splat(EXPONENT_OFFSET), s.splat(0x3F80_0000));
    let mut signed = MaybeUninit::<[[i32; 16]; MAX_BLOCK / 4 + 1]>::uninit();
    let signed = signed.as_mut_ptr().cast::<i32>();
    // SAFETY: the caller's word; words of two quads reach at most one quad past the block.
    unsafe {
        for (pixel, sources) in of.sources.chunks_exact(of.taps).enumerate() {
            for block in 0..yl.blocks() {
                let dy = of.dy.add(pixel * yl.pixel_bytes(S::LANES) + block * y_block);
                let each = S::LANES * (1 + usize::from(yl.nibbles));
                for word in 0..yl.words() {
                    lower(s, dy.add(4 * S::LANES * word).cast(), yl.nibbles, signed.add(each * word));
                }
                if yl.words() * each < xl.words() * S::LANES * (1 + usize::from(xl.nibbles)) {
                    s.store(signed.add(each * yl.words()), s.splat(0));
                }
                let ey = s.sub(s.load_u8(dy.add(4 * S::LANES * yl.words())), offset);
                let scale = s.add(s.shl::<23>(ey), one);
                let mut start = s.splat(0);
                for quad in 0..yl.block.div_ceil(4) {
                    start = s.dot4_small(start, bytes(s, 1), s.load(signed.add(S::LANES * quad)));
                }
                let start = if xl.nibbles { s.shl::<3>(start) } else { s.shl::<7>(start) };
                let start = s.sub(s.splat(0), start);
                let taps = sources[of.first..].iter().zip(sums.chunks_exact_mut(C * S::LANES));
                for (&source, sums) in taps {
                    // A block of zeros adds nothing.
                    if source < 0 {
                        continue;
                    }
                    let x = of.x.add(source as usize * xl.pixel_bytes(S::LANES) + block * x_block);
                    let mut products = [start; C];
                    for word in 0..xl.words() {
                        let raised = s.load(x.add(4 * S::LANES * word).cast());
                        if xl.nibbles {
                            let low = bytes(s, 15);
                            let at = signed.add(2 * S::LANES * word);
                            add_products(s, &mut products, s.and(raised, low), s.load(at), of.small);
                            let (second, at) = (s.and(s.sar::<4>(raised), low), at.add(S::LANES));
                            add_products(s, &mut products, second, s.load(at), of.small);
                        } else {
                            add_products(s, &mut products, raised, s.load(signed.add(S::LANES * word)), of.small);
                        }
                    }
                    let ex = s.shl::<23>(s.sub(s.load_u8(x.add(4 * S::LANES * xl.words())), offset));
                    for (r, product) in products.into_iter().enumerate() {
                        let sum = sums.as_mut_ptr().add(S::LANES * r).cast();
                        let scale = s.add(scale, exchanged(s, ex, r));
                        s.store(sum, s.mul_add_f32(s.to_f32(product), scale, s.load(sum)));
                    }
                }
            }
        }
    }
}

/// Adds dY's words times X's, of every r.
#[inline(always)]
fn add_products<S: Simd, const C: usize>(s: S, products: &mut [S::V; C], raised: S::V, signed: S::V, small: bool) {
    for (r, product) in products.iter_mut().enumerate() {
        *product = dot(s, *product, exchanged(s, raised, r), signed, small);
    }
}
