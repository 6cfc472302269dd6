//! Patches of an image, for blocks that run over the flattened patch: put together as floats and encoded, some at a time.
//!
//! Neighbouring patches lie side by side, so that they are encoded lane by lane however short they are; and what a tap finds
//! of one channel along a row of pixels is one run of memory, once the row's channels lie apart.
#![allow(unsafe_code, reason = "lines of floats that were just put together")]

use super::pixels::PixelProduct;
use super::prepared::Image;
use super::product_of;
use super::reach::AxisReach;
use crate::arch::generic::product::PANEL_ROWS;
use crate::encode::Context;
use crate::encode::blocks::Scratch;
use crate::encode::codes::Codes;
use crate::encode::filling::{Filling, Job, Source};
use crate::encode::panels::PanelLayout;
use crate::parallel::Serial;
use crate::shape::FloatLines;
use std::ops::Range;
use std::sync::atomic::Ordering;

pub(super) struct Patches<'a> {
    of: &'a PixelProduct<'a>,
    reach: AxisReach,
    /// For each tap along a row of pixels: the patches that find pixels there, and what the first of them finds.
    taps: Vec<(Range<usize>, usize)>,
}

impl<'a> Patches<'a> {
    pub(super) fn new(of: &'a PixelProduct<'a>) -> Self {
        let reach = of.convolution.axis_reach();
        let taps = (0..of.convolution.kernel[2]).map(|tap| reach.along_rows(tap)).collect();
        Self { of, reach, taps }
    }

    /// Panels of the patches of some pixels of one sample, in `scratch`, with their flags.
    pub(super) fn encode(
        &self,
        ctx: &Context<'_>,
        sample: usize,
        g: usize,
        pixels: Range<usize>,
        al: &PanelLayout,
        scratch: &mut Scratch,
    ) {
        let (mut patches, mut panels) =
            (std::mem::take(&mut scratch.patches), std::mem::take(&mut scratch.patch_panels));
        let lines = self.lines(sample, g, pixels, &mut patches, &mut scratch.row);
        let source = Source::Floats(&lines, self.of.left.mode);
        let layout = PanelLayout::new(source.shape(), al.block, PANEL_ROWS, al.side);
        let ctx = Context { kernels: ctx.kernels, team: &Serial, threads: 1 };
        let job = Job::new(&source, self.of.left.format, layout, panels.reserve(&layout));
        Filling::new(&ctx, job).run_all(&ctx, scratch).expect("floats can always be encoded");
        for (panel, flag) in panels.general.iter().enumerate().take(layout.panels) {
            scratch.general[panel] = flag.load(Ordering::Relaxed) != 0;
        }
        (scratch.patches, scratch.patch_panels) = (patches, panels);
    }

    /// Codes of one patch.
    pub(super) fn codes(&self, ctx: &Context<'_>, sample: usize, g: usize, pixel: usize) -> Codes {
        let (mut patches, mut row) = (Vec::new(), Vec::new());
        let lines = self.lines(sample, g, pixel..pixel + 1, &mut patches, &mut row);
        let ctx = Context { kernels: ctx.kernels, team: &Serial, threads: 1 };
        Codes::from_floats(&ctx, &lines, self.of.left.format, self.of.left.mode)
    }

    /// Number of a patch's row among those of the tensor of patches.
    fn row(&self, sample: usize, g: usize, pixel: usize) -> usize {
        (sample * self.of.groups + g) * self.reach.pixels() + pixel
    }

    /// The patches of some pixels of one sample, put together in `patches` [taps · channels of the group, pixels].
    fn lines<'p>(
        &self,
        sample: usize,
        g: usize,
        pixels: Range<usize>,
        patches: &'p mut Vec<f32>,
        row: &mut Vec<f32>,
    ) -> FloatLines<'p> {
        let (channels, count) = (self.of.channels, pixels.len());
        let k = self.reach.taps() * channels;
        patches.resize(patches.len().max(k * count), 0.0);
        let width = self.reach.row();
        let first_row = self.row(sample, g, pixels.start);
        let mut at = 0;
        for line in pixels.start / width..pixels.end.div_ceil(width) {
            let run = pixels.start.max(line * width) - line * width..pixels.end.min((line + 1) * width) - line * width;
            let taps_of_row = self.taps.len() * channels;
            for (tap_row, begin) in self.reach.of(line * width).0.enumerate() {
                let to = &mut patches[tap_row * taps_of_row * count + at..];
                self.fill(sample, g, begin, run.clone(), to, count, row);
            }
            at += run.len();
        }
        // SAFETY: so many elements were just written.
        unsafe { FloatLines::of_columns(patches.as_ptr(), [count, k], first_row) }
    }

    /// What a row of taps finds, tap by tap and channel by channel, each so many elements behind the one before: for a run of
    /// patches, in the row of pixels that begins at pixel `begin` of the sample, if there is one.
    fn fill(
        &self,
        sample: usize,
        g: usize,
        begin: i32,
        run: Range<usize>,
        patches: &mut [f32],
        between: usize,
        row: &mut Vec<f32>,
    ) {
        let Image { pixels, channels: all, .. } = self.of.image;
        let (channels, stride) = (self.of.channels, self.of.convolution.stride[2]);
        // Of a tap: the patches that find a pixel, and where the first does.
        let found = |(patches, source): &(Range<usize>, usize)| {
            let (from, to) = (patches.start.max(run.start), patches.end.min(run.end));
            (from < to && begin >= 0).then(|| (from..to, source + (from - patches.start) * stride))
        };
        // Pixels of the row that some tap finds: channel by channel, and of these every so many together.
        let (mut first, mut end) = (usize::MAX, 0);
        for (patches, source) in self.taps.iter().filter_map(found) {
            (first, end) = (first.min(source), end.max(source + (patches.len() - 1) * stride + 1));
        }
        let each = end.saturating_sub(first).div_ceil(stride);
        row.resize(row.len().max(channels * stride * each), 0.0);
        if first < end {
            let start = (sample * product_of(pixels) + begin as usize + first) * all + g * channels;
            let from = &self.of.x[start..start + (end - first - 1) * all + channels];
            for (i, row) in row.chunks_exact_mut(each).take(channels * stride).enumerate() {
                let from = from.get(i % stride * all + i / stride..).unwrap_or_default();
                row.iter_mut().zip(from.iter().step_by(stride * all)).for_each(|(to, &x)| *to = x);
            }
        }
        for (tap, patches) in self.taps.iter().zip(patches.chunks_mut(channels * between)) {
            let found = found(tap);
            for (channel, to) in patches.chunks_mut(between).enumerate() {
                let to = &mut to[..run.len()];
                let Some((there, source)) = &found else {
                    to.fill(0.0);
                    continue;
                };
                let source = source - first;
                let from = &row[(channel * stride + source % stride) * each + source / stride..][..there.len()];
                let (before, rest) = to.split_at_mut(there.start - run.start);
                let (there, behind) = rest.split_at_mut(there.len());
                before.fill(0.0);
                copy(there, from);
                behind.fill(0.0);
            }
        }
    }
}

/// Copies some elements: a call of memcpy would take longer than they do.
#[inline]
fn copy(to: &mut [f32], from: &[f32]) {
    let (Some(&last), Some(end)) = (from.last_chunk::<8>(), to.len().checked_sub(8)) else {
        return to.copy_from_slice(from);
    };
    to.as_chunks_mut::<8>().0.iter_mut().zip(from.as_chunks::<8>().0).for_each(|(to, from)| *to = *from);
    // It may overlap those before.
    to[end..].copy_from_slice(&last);
}
