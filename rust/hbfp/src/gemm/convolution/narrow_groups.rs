//! Convolutions whose groups have as few channels on either side as the kernels of
//! [`crate::arch::generic::narrow_groups`] take: depthwise ones, and others of many groups.
//!
//! Each of the three products gives up, and leaves its result unspecified, where a block needs the general product: the
//! ways that other convolutions go then serve here, too.
#![allow(unsafe_code, reason = "calls of kernels, and tasks that write disjoint pixels")]

use super::pixels::PixelProduct;
use super::prepared::{KernelCopy, Plane, row_bits};
use super::reach::Reach;
use super::{Convolution, Input, Place, Taps, product_of};
use crate::arch::generic::encode::{FAST_SCALES, PanelCoding, ROW_PADDING};
use crate::arch::generic::narrow_groups::{
    ColumnLayout, Meetings, Patches, Pixels, RAISED, Samples, Sums, is_narrow, is_small, patch_block, pixel_tap,
    pixel_words,
};
use crate::arch::generic::philox::{Counters, RANDOM_PADDING};
use crate::arch::kernels::Kernels;
use crate::encode::Context;
use crate::encode::blocks::{RoundingMode, Scratch};
use crate::encode::codes::Codes;
use crate::encode::panels::{Panels, PanelsRef};
use crate::format::{BlockFormat, EXPONENT_OFFSET, NAN_EXPONENT};
use crate::gemm::cache::Caches;
use crate::gemm::{Coding, Workspace};
use crate::mem::{AlignedBytes, SharedMut};
use crate::parallel::for_each_task;
use crate::shape::FloatLines;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Tasks for each thread, so that all end together.
const TASKS_PER_WORKER: usize = 4;
/// Pixels whose samples a task encodes.
const PIXELS: usize = 16;

/// Channels of a register.
fn lanes(kernels: &Kernels) -> usize {
    kernels.columns / 2
}

/// So that a format takes it: how a left operand is encoded here.
fn coding_of(format: BlockFormat) -> PanelCoding {
    PanelCoding::new(format, 0, None)
}

/// Scale exponents of a right operand's block. None: it needs the general product.
fn scale_of(codes: &Codes, row: usize, block: usize) -> Option<i32> {
    let all = &codes.codes[row * codes.k..][block * codes.block..((block + 1) * codes.block).min(codes.k)];
    let exponent = codes.exponents[row * codes.blocks() + block];
    if exponent == NAN_EXPONENT {
        return None;
    }
    // A block of zeros adds nothing under any exponent.
    let scale = if all.iter().all(|&code| code == 0) { 0 } else { i32::from(exponent) - EXPONENT_OFFSET };
    FAST_SCALES.contains(&scale).then_some(scale)
}

/// 2^scale, as bits.
fn power(scale: i32) -> i32 {
    (scale + 127) << 23
}

/// A word of four codes.
fn word(code: impl Fn(usize) -> i16) -> i32 {
    i32::from_le_bytes(std::array::from_fn(|i| code(i) as i8 as u8))
}

/// So many zeros, on cache lines: a register that lies on two of them takes twice as long to load.
fn zero_words(memory: &mut AlignedBytes, len: usize) -> &mut [i32] {
    let words = memory.reserve(4 * len).as_ptr().cast();
    // SAFETY: so many were just reserved, and are borrowed.
    let words = unsafe { std::slice::from_raw_parts_mut(words, len) };
    words.fill(0);
    words
}

impl Convolution {
    /// Whether its groups are narrow.
    pub(super) fn is_narrow(&self) -> bool {
        let [channels, columns] = self.group_channels();
        self.groups > 1 && channels == columns && is_narrow(channels)
    }

    fn column_layout(&self, format: BlockFormat) -> ColumnLayout {
        ColumnLayout { samples: self.batch, block: format.block_along(self.batch), nibbles: format.bits() <= 4 }
    }

    /// Bytes of an image's columns: a register's pixels follow each other, and the registers.
    fn column_bytes(&self, ctx: &Context<'_>, place: Place, format: BlockFormat) -> usize {
        let (image, lanes) = (self.image(place), lanes(ctx.kernels));
        let pixels = image.channels.div_ceil(lanes) * product_of(image.pixels);
        pixels * self.column_layout(format).pixel_bytes(lanes)
    }

    /// Columns, and behind them whether one of their blocks needs the general product.
    pub(super) fn kept_column_bytes(&self, ctx: &Context<'_>, place: Place, format: BlockFormat) -> usize {
        self.column_bytes(ctx, place, format) + 1
    }

    /// Writes an image's columns. Returns whether one of their blocks needs the general product.
    fn encode_columns(
        &self,
        ctx: &Context<'_>,
        place: Place,
        x: &[f32],
        coding: Coding,
        plane: &Plane,
        to: SharedMut<'_, u8>,
    ) -> bool {
        let (image, lanes, layout) = (self.image(place), lanes(ctx.kernels), self.column_layout(coding.format));
        let (pixels, channels, each) = (product_of(image.pixels), image.channels, layout.pixel_bytes(lanes));
        let general = AtomicBool::new(false);
        let panel_coding = coding_of(coding.format);
        let encode = ctx.kernels.narrow.encode_columns[coding.mode.rounding as usize];
        for_each_task(ctx.team, ctx.workers(x.len()), pixels.div_ceil(PIXELS), &|_, task| {
            let mut outside = false;
            for pixel in task * PIXELS..((task + 1) * PIXELS).min(pixels) {
                for (register, first) in (0..channels).step_by(lanes).enumerate() {
                    let at = pixel * channels + first;
                    let random = if coding.mode.is_stochastic() { plane.bits().wrapping_add(at) } else { plane.bits() };
                    let samples = Samples {
                        x: x[at..].as_ptr(),
                        left: channels - first,
                        stride: pixels * channels,
                        random,
                        layout,
                    };
                    let to = to.pointer((register * pixels + pixel) * each, each);
                    // SAFETY: the callers checked the image's size, and its plane has as many elements and the padding; every
                    // pixel belongs to one task.
                    outside |= unsafe { encode(&samples, &panel_coding, to) };
                }
            }
            if outside {
                general.store(true, Ordering::Relaxed);
            }
        });
        general.into_inner()
    }

    /// [`Convolution::keep`] of narrow groups.
    pub(super) fn keep_columns(
        &self,
        ctx: &Context<'_>,
        place: Place,
        x: &[f32],
        coding: Coding,
        plane: &Plane,
        bytes: &mut [u8],
    ) {
        let Some((general, bytes)) = bytes.split_last_mut() else { return };
        *general = u8::from(self.encode_columns(ctx, place, x, coding, plane, SharedMut::new(bytes)));
    }

    /// Codes of some channels of what was kept, pixel by pixel.
    pub(super) fn codes_of_columns(
        &self,
        ctx: &Context<'_>,
        place: Place,
        kept: &[u8],
        format: BlockFormat,
        channels: Range<usize>,
    ) -> Codes {
        let (lanes, layout) = (lanes(ctx.kernels), self.column_layout(format));
        let (pixels, each) = (product_of(self.image(place).pixels), layout.pixel_bytes(lanes));
        let (lines, k, block) = (pixels * channels.len(), self.batch, layout.block);
        let (mut codes, mut exponents) = (Vec::with_capacity(lines * k), Vec::new());
        for pixel in 0..pixels {
            for channel in channels.clone() {
                let (register, lane) = (channel / lanes, channel % lanes);
                let pixel = &kept[(register * pixels + pixel) * each..][..each];
                codes.extend((0..k).map(|sample| layout.code(pixel, lanes, lane, sample)));
                exponents.extend((0..layout.blocks()).map(|block| layout.exponent(pixel, lanes, lane, block)));
            }
        }
        Codes { format, matrices: 1, lines, k, block, codes, exponents }
    }

    /// dW of narrow groups from X and dY. False: another way has to be taken.
    pub(super) fn weight_by_lanes(
        &self,
        ctx: &Context<'_>,
        operands: [(Input<'_>, Coding, &Plane); 2],
        reach: &Reach,
        out: &mut [f32],
        memory: [&mut Panels; 2],
        scratch: &[Mutex<Scratch>],
    ) -> bool {
        if !self.is_narrow() {
            return false;
        }
        let lanes = lanes(ctx.kernels);
        let ([group, _], taps, channels) = (self.group_channels(), self.taps(), self.channels[0]);
        let places = [Place::Input, Place::Output];
        let mut columns = [PanelsRef::new((&[], &[])); 2];
        for (i, memory) in memory.into_iter().enumerate() {
            let (values, coding, plane) = operands[i];
            let general = match values {
                Input::Floats(x) => {
                    let panels = memory.reserve_bytes(self.column_bytes(ctx, places[i], coding.format), 0);
                    columns[i] = panels.as_ref();
                    self.encode_columns(ctx, places[i], x, coding, plane, panels.bytes)
                }
                Input::Kept(bytes) => {
                    columns[i] = PanelsRef::new((bytes, &[]));
                    bytes.last().is_some_and(|&general| general != 0)
                }
            };
            if general {
                return false;
            }
        }
        let formats = operands.map(|(_, coding, _)| coding.format);
        let layouts = formats.map(|format| self.column_layout(format));
        let pixels = places.map(|place| product_of(self.image(place).pixels));
        let small = is_small(layouts[0].raised(), formats[0].max_code(), formats[1].max_code());
        let registers = channels.div_ceil(lanes);
        let macs = self.batch.saturating_mul(pixels[1]).saturating_mul(channels * group * taps);
        let workers = ctx.workers(macs);
        // Tasks share a register's taps where there are fewer registers than tasks.
        let shares = if workers > 1 { (TASKS_PER_WORKER * workers).div_ceil(registers).min(taps) } else { 1 };
        let together = taps.div_ceil(shares);
        let shares = taps.div_ceil(together);
        let sum = ctx.kernels.narrow.sum_pixels[group.trailing_zeros() as usize];
        let out = SharedMut::new(out);
        for_each_task(ctx.team, workers, registers * shares, &|worker, task| {
            let (register, first) = (task / shares, task % shares * together);
            let together = together.min(taps - first);
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            let sums = &mut scratch.patches;
            sums.clear();
            sums.resize(together * group * lanes, 0.0);
            let at = |i: usize| register * pixels[i] * layouts[i].pixel_bytes(lanes);
            let of = Sums {
                x: columns[0].bytes.wrapping_add(at(0)),
                dy: columns[1].bytes.wrapping_add(at(1)),
                layouts,
                small,
                sources: reach.all(),
                taps,
                first,
            };
            // SAFETY: columns of whole images, whose size the callers checked where they were kept.
            unsafe { sum(&of, sums) };
            for (i, sums) in sums.chunks_exact(lanes).enumerate() {
                let (tap, r) = (first + i / group, i % group);
                for (lane, &sum) in sums.iter().enumerate().take(channels - register * lanes) {
                    let channel = register * lanes + lane;
                    let (g, j) = (channel / group, channel % group);
                    // SAFETY: every tap of a channel belongs to one task.
                    unsafe { out.part(((g * taps + tap) * group + (j ^ r)) * group + j, 1)[0] = sum };
                }
            }
        });
        true
    }
}

impl PixelProduct<'_> {
    /// Y or dX of narrow groups. False: another way has to be taken.
    pub(super) fn by_lanes(
        &self,
        ctx: &Context<'_>,
        kernel: &KernelCopy<'_>,
        flatten: bool,
        out: &mut [f32],
        workspace: &mut Workspace,
    ) -> bool {
        // Blocks of whole taps, or the only ones.
        let fits = self.block.is_multiple_of(self.channels) || self.block >= self.line(flatten);
        let finite = self.bias.is_none_or(|bias| bias.iter().all(|x| x.is_finite()));
        if !(self.convolution.is_narrow() && fits && finite) {
            return false;
        }
        let Workspace { right, scratch, .. } = workspace;
        if flatten {
            self.patches_by_lanes(ctx, kernel, out, &mut right.bytes, scratch)
        } else {
            self.pixels_by_lanes(ctx, kernel, out, &mut right.bytes, scratch)
        }
    }

    fn is_small(&self) -> bool {
        is_small(RAISED, self.left.format.max_code(), self.right.format.max_code())
    }

    fn patches_by_lanes(
        &self,
        ctx: &Context<'_>,
        kernel: &KernelCopy<'_>,
        out: &mut [f32],
        memory: &mut AlignedBytes,
        scratch: &[Mutex<Scratch>],
    ) -> bool {
        let (taps, group, channels) = (self.convolution.taps(), self.channels, self.image.channels);
        let together = (self.block / group).clamp(1, taps);
        let Some(words) = self.patch_kernel(ctx, kernel, together, memory) else { return false };
        let reach = self.convolution.reach();
        let (pixels, row_pixels) = (product_of(self.image.pixels), product_of(self.product.pixels));
        let workers = self.workers(ctx, 0);
        let shares = (TASKS_PER_WORKER * workers).div_ceil(self.image.batch).min(row_pixels);
        let each = row_pixels.div_ceil(shares);
        let shares = row_pixels.div_ceil(each);
        let general = AtomicBool::new(false);
        let coding = coding_of(self.left.format);
        let encode = ctx.kernels.narrow.patches[self.left.mode.rounding as usize];
        let shared = SharedMut::new(out);
        let around = goes_around(ctx.kernels, shared, channels);
        for_each_task(ctx.team, workers, self.image.batch * shares, &|worker, task| {
            if general.load(Ordering::Relaxed) {
                return;
            }
            let (sample, first) = (task / shares, task % shares * each);
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            let Scratch { zeros, bits, random, .. } = &mut *scratch;
            zeros.resize(zeros.len().max(channels), 0.0);
            let mut found = vec![std::ptr::null(); taps];
            // Random bits are those of one pixel.
            let stochastic = self.left.mode.is_stochastic();
            let step = if stochastic { 1 } else { each };
            for pixel in (first..(first + each).min(row_pixels)).step_by(step) {
                let count = step.min((first + each).min(row_pixels) - pixel);
                if stochastic {
                    let row = sample * self.groups * row_pixels + pixel;
                    patch_bits(
                        ctx.kernels,
                        self.left.mode,
                        [row, row_pixels],
                        [self.groups, taps, group],
                        random,
                        bits,
                    );
                }
                let of = Patches {
                    image: self.x[sample * pixels * channels..].as_ptr(),
                    zeros: zeros.as_ptr(),
                    channels,
                    group,
                    sources: &reach.all()[pixel * taps..][..count * taps],
                    taps,
                    together,
                    kernel: words.as_ptr(),
                    small: self.is_small(),
                    random: bits.as_ptr(),
                    bias: self.bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
                    out: shared.pointer((sample * row_pixels + pixel) * channels, count * channels),
                    around,
                };
                // SAFETY: the image's size was checked; pixels belong to one task.
                if unsafe { encode(&of, &coding, &mut found) } {
                    general.store(true, Ordering::Relaxed);
                }
            }
            // SAFETY: the level's own.
            unsafe { (ctx.kernels.narrow.fence)() };
        });
        !general.into_inner()
    }

    /// None: a block needs the general product.
    fn patch_kernel<'m>(
        &self,
        ctx: &Context<'_>,
        kernel: &KernelCopy<'_>,
        together: usize,
        memory: &'m mut AlignedBytes,
    ) -> Option<&'m [i32]> {
        let (taps, group, channels) = (self.convolution.taps(), self.channels, self.product.channels);
        let (lanes, patch) = (lanes(ctx.kernels), taps * group);
        let strides = [patch as isize, 1];
        // SAFETY: the copy has a patch for every channel, its plane as many and the padding.
        let lines =
            unsafe { FloatLines::with_plane(kernel.floats(), kernel.bits(), vec![0], [channels, patch], strides) };
        let codes = Codes::from_floats(ctx, &lines, self.right.format, self.right.mode);
        let blocks = taps.div_ceil(together);
        let block_words = patch_block(lanes, together, group);
        let words = zero_words(memory, channels.div_ceil(lanes) * blocks * block_words);
        for channel in 0..channels {
            let (lane, code) = (channel % lanes, &codes.codes[channel * patch..][..patch]);
            for block in 0..blocks {
                let words = &mut words[(channel / lanes * blocks + block) * block_words..][..block_words];
                let (first, end) = (block * together, ((block + 1) * together).min(taps));
                let sum: i32 = code[first * group..end * group].iter().map(|&code| i32::from(code)).sum();
                words[lane] = -RAISED * sum;
                words[lanes + lane] = power(scale_of(&codes, channel, block)?);
                for quad in 0..(end - first).div_ceil(4) {
                    for r in 0..group {
                        words[lanes * (2 + quad * group + r) + lane] = word(|i| {
                            let tap = first + 4 * quad + i;
                            if tap < end { code[tap * group + ((channel % group) ^ r)] } else { 0 }
                        });
                    }
                }
            }
        }
        Some(words)
    }

    fn pixels_by_lanes(
        &self,
        ctx: &Context<'_>,
        kernel: &KernelCopy<'_>,
        out: &mut [f32],
        memory: &mut AlignedBytes,
        scratch: &[Mutex<Scratch>],
    ) -> bool {
        let (taps, group, channels) = (self.convolution.taps(), self.channels, self.image.channels);
        let lanes = lanes(ctx.kernels);
        let Some(words) = self.pixel_kernel(ctx, kernel, memory) else { return false };
        let register_words = taps * pixel_tap(lanes, group);
        let reach = match self.taps {
            Taps::Forward => self.convolution.reach(),
            Taps::Backward => self.convolution.reverse(),
        };
        let (pixels, row_pixels) = (product_of(self.image.pixels), product_of(self.product.pixels));
        let workers = self.workers(ctx, 0);
        // Channels of a task: so many that its pixels stay in the second-level cache.
        let registers = channels.div_ceil(lanes);
        let most = (Caches::get().l2 / 2 / (4 * pixels.max(1) * pixel_words(lanes))).clamp(1, registers);
        let shares = (TASKS_PER_WORKER * workers).div_ceil(self.image.batch).max(registers.div_ceil(most));
        let together = registers.div_ceil(shares.min(registers));
        let shares = registers.div_ceil(together);
        let general = AtomicBool::new(false);
        let coding = coding_of(self.left.format);
        let encode = ctx.kernels.narrow.encode_pixels[self.left.mode.rounding as usize];
        let shared = SharedMut::new(out);
        let around = goes_around(ctx.kernels, shared, channels);
        for_each_task(ctx.team, workers, self.image.batch * shares, &|worker, task| {
            if general.load(Ordering::Relaxed) {
                return;
            }
            let (sample, first) = (task / shares, task % shares * together);
            let run = first * lanes..((first + together) * lanes).min(channels);
            let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
            let Scratch { strips, bits, .. } = &mut *scratch;
            let pitch = (pixels + 1) * pixel_words(lanes);
            let to = strips.reserve(4 * together * pitch).as_ptr().cast::<i32>();
            let width = self.image.pixels[2];
            let mut outside = false;
            for line in 0..pixels / width.max(1) {
                if self.left.mode.is_stochastic() {
                    bits.resize(bits.len().max(width * run.len() + ROW_PADDING), 0);
                    let seed = self.left.mode.seed;
                    row_bits(ctx.kernels, self.image, run.clone(), seed, [sample, line], bits);
                }
                let at = (sample * pixels + line * width) * channels + run.start;
                let of = Pixels {
                    count: width,
                    x: self.x[at..].as_ptr(),
                    stride: channels,
                    channels: run.len(),
                    group,
                    random: bits.as_ptr(),
                    to: to.wrapping_add(line * width * pixel_words(lanes)),
                    pitch,
                };
                // SAFETY: the image's size was checked; the buffer has room for the registers' pixels.
                outside |= unsafe { encode(&of, &coding) };
            }
            if outside {
                general.store(true, Ordering::Relaxed);
                return;
            }
            let registers = first..run.end.div_ceil(lanes);
            for register in registers.clone() {
                let none = (register - first) * pitch + pixels * pixel_words(lanes);
                // SAFETY: the buffer has room for one pixel more than there are.
                unsafe { (ctx.kernels.narrow.zero_pixel)(to.wrapping_add(none)) };
            }
            // A row of pixels at a time: what is written there follows itself.
            let row = self.product.pixels[2];
            for (line, register) in (0..row_pixels / row).flat_map(|line| registers.clone().map(move |r| (line, r))) {
                let channel = register * lanes;
                let at = (sample * row_pixels + line * row) * channels + channel;
                let left = lanes.min(channels - channel);
                let of = Meetings {
                    pixels: to.wrapping_add((register - first) * pitch),
                    kernel: words[register * register_words..].as_ptr(),
                    group,
                    small: self.is_small(),
                    none: pixels,
                    sources: &reach.all()[line * row * taps..][..row * taps],
                    taps,
                    bias: self.bias.map_or(std::ptr::null(), |bias| bias[channel..].as_ptr()),
                    out: shared.pointer(at, (row - 1) * channels + left),
                    left,
                    stride: channels,
                    around,
                };
                // SAFETY: pixels were encoded, of registers with a kernel; channels of a sample belong to one task.
                unsafe { (ctx.kernels.narrow.multiply_pixels)(&of) };
            }
            // SAFETY: the level's own.
            unsafe { (ctx.kernels.narrow.fence)() };
        });
        !general.into_inner()
    }

    /// None: a block needs the general product.
    fn pixel_kernel<'m>(
        &self,
        ctx: &Context<'_>,
        kernel: &KernelCopy<'_>,
        memory: &'m mut AlignedBytes,
    ) -> Option<&'m [i32]> {
        let (taps, group, channels) = (self.convolution.taps(), self.channels, self.product.channels);
        let (lanes, patch) = (lanes(ctx.kernels), taps * group);
        let strides = match self.taps {
            Taps::Forward => [patch as isize, 1],
            Taps::Backward => [1, patch as isize],
        };
        let offsets =
            (0..self.groups).flat_map(|g| (0..taps).map(move |tap| (g * group * patch + tap * group) as isize));
        // SAFETY: the copy has a patch for every output channel, its plane as many and the padding.
        let lines =
            unsafe { FloatLines::with_plane(kernel.floats(), kernel.bits(), offsets.collect(), [group; 2], strides) };
        let codes = Codes::from_floats(ctx, &lines, self.right.format, self.right.mode);
        let tap_words = pixel_tap(lanes, group);
        let words = zero_words(memory, channels.div_ceil(lanes) * taps * tap_words);
        for channel in 0..channels {
            let (lane, j) = (channel % lanes, channel % group);
            for tap in 0..taps {
                let row = (channel / group * taps + tap) * group + j;
                let code = &codes.codes[row * group..][..group];
                let words = &mut words[(channel / lanes * taps + tap) * tap_words..][..tap_words];
                words[lane] = -RAISED * code.iter().map(|&code| i32::from(code)).sum::<i32>();
                words[lanes + lane] = power(scale_of(&codes, row, 0)?);
                for first in (0..group).step_by(4) {
                    words[lanes * (2 + first / 4) + lane] =
                        word(|i| if first + i < group { code[j ^ (first + i)] } else { 0 });
                }
            }
        }
        Some(words)
    }
}

/// Whether what is written once, pixel by pixel, goes around the caches, where it would not stay: whole registers on cache
/// lines.
fn goes_around(kernels: &Kernels, out: SharedMut<'_, f32>, channels: usize) -> bool {
    let large = size_of::<f32>() * out.len() >= 2 * Caches::get().l2;
    large && channels.is_multiple_of(lanes(kernels)) && (out.as_ptr() as usize).is_multiple_of(64)
}

/// Random bits of the patches of one pixel, [taps, channels of all groups]: `row` is that of the first group's patch,
/// followed by the next one's after so many.
fn patch_bits(
    kernels: &Kernels,
    mode: RoundingMode,
    [row, row_step]: [usize; 2],
    [groups, taps, group]: [usize; 3],
    random: &mut Vec<u16>,
    bits: &mut Vec<u16>,
) {
    let (channels, counted) = (groups * group, (taps * group).div_ceil(8));
    random.resize(random.len().max(8 * counted * groups + RANDOM_PADDING), 0);
    bits.resize(bits.len().max(taps * channels + ROW_PADDING), 0);
    let counters = Counters { row: row as u32, row_step: row_step as u32, rows: groups, group: 0, groups: counted };
    // SAFETY: room for the rectangle and its padding.
    unsafe { (kernels.fill_random)(mode.seed, counters, random.as_mut_ptr()) };
    for (g, patch) in random.chunks_exact(8 * counted).enumerate().take(groups) {
        for (tap, from) in patch.chunks_exact(group).enumerate().take(taps) {
            bits[tap * channels + g * group..][..group].copy_from_slice(from);
        }
    }
}
