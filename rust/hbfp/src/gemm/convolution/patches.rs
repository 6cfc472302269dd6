//! Patches of an image, for blocks that run over the flattened patch: put together as floats and encoded, some at a time.
#![allow(unsafe_code, reason = "lines of floats that were just put together")]

use super::pixels::PixelProduct;
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
}

impl<'a> Patches<'a> {
    pub(super) fn new(of: &'a PixelProduct<'a>) -> Self {
        Self { of, reach: of.convolution.axis_reach() }
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
        let k = self.rows(sample, g, pixels.clone(), &mut patches);
        // SAFETY: `patches` holds as many rows of `k` elements.
        let lines = unsafe {
            FloatLines::of_rows(patches.as_ptr(), [pixels.len(), k], k, true, self.row(sample, g, pixels.start))
        };
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
        let mut patches = Vec::new();
        let k = self.rows(sample, g, pixel..pixel + 1, &mut patches);
        // SAFETY: one row of `k` elements.
        let lines = unsafe { FloatLines::of_rows(patches.as_ptr(), [1, k], k, true, self.row(sample, g, pixel)) };
        let ctx = Context { kernels: ctx.kernels, team: &Serial, threads: 1 };
        Codes::from_floats(&ctx, &lines, self.of.left.format, self.of.left.mode)
    }

    /// Number of a patch's row among those of the tensor of patches.
    fn row(&self, sample: usize, g: usize, pixel: usize) -> usize {
        (sample * self.of.groups + g) * self.reach.pixels() + pixel
    }

    /// Patches [pixels, taps · channels of the group] of one sample; the elements of one of them.
    fn rows(&self, sample: usize, g: usize, pixels: Range<usize>, patches: &mut Vec<f32>) -> usize {
        let (channels, all) = (self.of.channels, self.of.image.channels);
        let k = self.reach.taps() * channels;
        let image = &self.of.x[sample * product_of(self.of.image.pixels) * all..];
        patches.clear();
        patches.resize(pixels.len() * k, 0.0);
        let row = self.of.convolution.kernel[2];
        for (patch, pixel) in patches.chunks_exact_mut(k).zip(pixels) {
            let (begins, columns) = self.reach.of(pixel);
            // Neighbours all of them, and all of their channels.
            let run = channels == all && columns[0] >= 0 && columns[row - 1] == columns[0] + row as i32 - 1;
            for (to, begin) in patch.chunks_exact_mut(row * channels).zip(begins) {
                if begin < 0 {
                    continue;
                }
                if run {
                    copy(to, &image[(begin + columns[0]) as usize * all..][..row * all]);
                    continue;
                }
                for (to, &column) in to.chunks_exact_mut(channels).zip(columns) {
                    if column >= 0 {
                        copy(to, &image[(begin + column) as usize * all + g * channels..][..channels]);
                    }
                }
            }
        }
        k
    }
}

/// Copies a few elements: a call of memcpy would take longer than they do.
#[inline]
fn copy(to: &mut [f32], from: &[f32]) {
    let ((to, to_rest), (from, from_rest)) = (to.as_chunks_mut::<4>(), from.as_chunks::<4>());
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
    for (to, from) in to_rest.iter_mut().zip(from_rest) {
        *to = *from;
    }
}
