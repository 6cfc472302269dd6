//! What a convolution prepares before it encodes: the kernel in the order of its products, and random bits in the order of
//! an image's elements.
#![allow(unsafe_code, reason = "tasks that write disjoint parts of a buffer")]

use super::{check_rows, product_of};
use crate::arch::generic::encode::ROW_PADDING;
use crate::arch::generic::philox::Counters;
use crate::arch::kernels::Kernels;
use crate::encode::Context;
use crate::error::Result;
use crate::gemm::Coding;
use crate::mem::{AlignedBytes, SharedMut};
use crate::parallel::for_each_task;
use crate::rng::Seed;
use crate::shape::{FloatTensor, element_count};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Clone, Copy)]
pub(super) struct Image {
    pub(super) batch: usize,
    pub(super) pixels: [usize; 3],
    pub(super) channels: usize,
}

impl Image {
    pub(super) fn check_rows(&self) -> Result<()> {
        let [p0, p1, _] = self.pixels;
        element_count(&[self.batch, self.channels, p0, p1]).and_then(|rows| check_rows(rows, "image"))
    }
}

/// A kernel in the order [out, taps, in / groups], with random bits in the same order.
pub(super) struct KernelCopy<'a> {
    w: &'a FloatTensor<'a>,
    seed: Option<Seed>,
    floats: SharedMut<'a, f32>,
    bits: SharedMut<'a, u16>,
    /// Whether an element is not finite.
    nan_blocks: AtomicBool,
}

impl<'a> KernelCopy<'a> {
    pub(super) fn new(
        w: &'a FloatTensor<'a>,
        coding: Coding,
        floats: &'a mut AlignedBytes,
        bits: &'a mut AlignedBytes,
    ) -> Self {
        let count: usize = w.shape().iter().product();
        let seed = coding.mode.is_stochastic().then_some(coding.mode.seed);
        let padded = if seed.is_some() { count + ROW_PADDING } else { 0 };
        // SAFETY: reserved for so many; used by nobody else as long as this lives.
        let (floats, bits) = unsafe {
            (
                SharedMut::from_raw(floats.reserve(4 * count).as_ptr().cast(), count),
                SharedMut::from_raw(bits.reserve(2 * padded).as_ptr().cast(), padded),
            )
        };
        Self { w, seed, floats, bits, nan_blocks: AtomicBool::new(false) }
    }

    pub(super) fn floats(&self) -> *const f32 {
        self.floats.as_ptr()
    }

    pub(super) fn bits(&self) -> *const u16 {
        if self.seed.is_some() { self.bits.as_ptr() } else { std::ptr::null() }
    }

    /// Whether blocks of it will be NaN blocks. After the tasks.
    pub(super) fn has_nan_blocks(&self) -> bool {
        self.nan_blocks.load(Ordering::Relaxed)
    }

    pub(super) fn tasks(&self) -> usize {
        self.w.shape()[0]
    }

    /// One output channel.
    pub(super) fn fill(&self, out: usize) {
        let &[_, channels, k0, k1, k2] = self.w.shape() else { unreachable!("checked") };
        let patch = channels * k0 * k1 * k2;
        // SAFETY: an output channel belongs to one task.
        let floats = unsafe { self.floats.part(out * patch, patch) };
        // From a channel to the next.
        let [first, second] = [0, 1].map(|c| self.w.at(&[0, c, 0, 0, 0]).addr());
        let stride = (second.wrapping_sub(first) as isize) / size_of::<f32>() as isize;
        for tap in 0..k0 * k1 * k2 {
            let (i, j, k) = (tap / (k1 * k2), tap / k2 % k1, tap % k2);
            let from = self.w.at(&[out, 0, i, j, k]);
            let to = &mut floats[tap * channels..][..channels];
            if stride == 1 {
                // SAFETY: as many elements of the tensor, one behind the other.
                to.copy_from_slice(unsafe { std::slice::from_raw_parts(from, channels) });
            } else {
                for (c, to) in to.iter_mut().enumerate() {
                    // SAFETY: inside the tensor.
                    *to = unsafe { *from.wrapping_offset(c as isize * stride) };
                }
            }
        }
        // Infinity and NaN have the largest exponent.
        if floats.iter().fold(0, |most, x| most.max(x.to_bits() << 1)) >= 0xFF00_0000 {
            self.nan_blocks.store(true, Ordering::Relaxed);
        }
        if let Some(seed) = self.seed {
            // SAFETY: as above.
            let bits = unsafe { self.bits.part(out * patch, patch) };
            for c in 0..channels {
                for tap in 0..k0 * k1 * k2 {
                    let row = (out * channels + c) * k0 * k1 + tap / k2;
                    bits[tap * channels + c] = seed.bits(row as u32, tap % k2);
                }
            }
        }
    }
}

/// Random bits of an image in the order of its elements, [batch, pixels, channels], where the rows of the tensor they
/// belong to are (sample, channel, all pixel coordinates but the last).
pub(super) struct Plane {
    image: Image,
    seed: Option<Seed>,
    bits: *mut u16,
}
// SAFETY: tasks write disjoint parts; reading comes after them.
unsafe impl Send for Plane {}
// SAFETY: as above.
unsafe impl Sync for Plane {}

impl Plane {
    pub(super) fn none() -> Self {
        let image = Image { batch: 0, pixels: [0; 3], channels: 0 };
        Self { image, seed: None, bits: std::ptr::null_mut() }
    }

    /// The plane of an image, filled; none where the coding takes no random bits.
    pub(super) fn filled(ctx: &Context<'_>, image: Image, coding: Coding, memory: &mut AlignedBytes) -> Self {
        let seed = coding.mode.is_stochastic().then_some(coding.mode.seed);
        let count = image.batch * product_of(image.pixels) * image.channels + ROW_PADDING;
        let bits = if seed.is_some() { memory.reserve(2 * count).as_ptr().cast() } else { std::ptr::null_mut() };
        let plane = Self { image, seed, bits };
        for_each_task(ctx.team, ctx.threads.max(1), plane.tasks(), &|_, task| plane.fill(ctx, task));
        plane
    }

    pub(super) fn bits(&self) -> *const u16 {
        self.bits
    }

    fn tasks(&self) -> usize {
        let [p0, p1, _] = self.image.pixels;
        if self.seed.is_some() { self.image.batch * p0 * p1 } else { 0 }
    }

    /// One row of pixels of one sample.
    fn fill(&self, ctx: &Context<'_>, task: usize) {
        let Image { pixels: [p0, p1, width], channels, .. } = self.image;
        let Some(seed) = self.seed else { return };
        let len = width * channels;
        // SAFETY: elements of one row of pixels, which belongs to one task.
        let to = unsafe { std::slice::from_raw_parts_mut(self.bits.add(task * len), len) };
        row_bits(ctx.kernels, self.image, 0..channels, seed, [task / (p0 * p1), task % (p0 * p1)], to);
    }
}

/// Random bits of some channels of a row of pixels, [pixels, channels], given its sample and its number in it.
pub(super) fn row_bits(
    kernels: &Kernels,
    image: Image,
    run: Range<usize>,
    seed: Seed,
    [sample, line]: [usize; 2],
    to: &mut [u16],
) {
    let Image { pixels: [p0, p1, width], channels, .. } = image;
    let row = (sample * channels + run.start) * p0 * p1 + line;
    let (row_step, groups) = ((p0 * p1) as u32, width.div_ceil(8));
    let counters = Counters { row: row as u32, row_step, rows: run.len(), group: 0, groups };
    assert!(to.len() >= width * run.len());
    // SAFETY: room for the pixels' channels.
    unsafe { (kernels.fill_random_columns)(seed, counters, width, to.as_mut_ptr()) };
}
