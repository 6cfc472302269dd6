//! Convolutions as implicit products: a tensor is encoded once, along its channels at each pixel or along the batch, and
//! the panels of the product are put together from these codes, a few rows at a time.
//!
//! Images are channels-last, [batch, pixels, channels]; a kernel is [out, in / groups, taps] with any strides. Clauses
//! 6.14 to 6.18 of the specification say what is computed.
#![allow(unsafe_code, reason = "tasks that write disjoint panels, rows and tiles")]
#![allow(clippy::too_many_arguments, reason = "a product: two operands, their codings, the output")]

mod field;
mod kept;
mod lattice;
mod narrow_groups;
mod patches;
mod pixels;
mod prepared;
mod reach;
mod weight;

pub use self::kept::{KeptKernel, keep_kernel, kept_kernel_bytes};
use self::prepared::Image;
use self::reach::{AxisReach, Reach};
use super::cache::Caches;
use super::{Coding, ROOM, Workspace, driver};
use crate::arch::generic::aligned;
use crate::encode::Context;
use crate::encode::blocks::Scratch;
use crate::encode::filling::Fillings;
use crate::encode::panels::PanelLayout;
use crate::error::{Error, Result};
use crate::format::BlockShape;
use crate::parallel::{Stage, for_each_stage};
use crate::shape::{FloatTensor, element_count};
use std::sync::{Mutex, PoisonError};

/// Shape of a convolution; sizes of fewer than three spatial dimensions are preceded by ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convolution {
    /// Samples.
    pub batch: usize,
    /// Channels of X and of Y.
    pub channels: [usize; 2],
    /// Groups.
    pub groups: usize,
    /// Pixels of X.
    pub input: [usize; 3],
    /// Pixels of Y.
    pub output: [usize; 3],
    /// Taps.
    pub kernel: [usize; 3],
    /// Pixels of X from a pixel of Y to the next.
    pub stride: [usize; 3],
    /// Pixels before the first of X.
    pub padding: [usize; 3],
    /// Pixels of X from a tap to the next.
    pub dilation: [usize; 3],
}

/// The kernel of a product, [out, in / groups, taps].
#[derive(Clone, Copy, Debug)]
pub enum Kernel<'a> {
    /// With all taps as they are, [out, in / groups, k0, k1, k2].
    Floats(&'a FloatTensor<'a>),
    /// Laid out before, for products of this direction.
    Kept(KeptKernel<'a>),
}

/// X or dY of a weight gradient.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// The image.
    Floats(&'a [f32]),
    /// What [`Convolution::keep`] wrote of it.
    Kept(&'a [u8]),
}

/// Which image of a weight gradient, by its place in the convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// X.
    Input,
    /// dY, in whose place a transposed convolution has its input.
    Output,
}

/// Rows of random bits are counted in 32 bits.
fn check_rows(rows: usize, of: &str) -> Result<()> {
    if rows as u64 > 1 << 32 {
        let expected = format!("at most 2^32 rows of the {of} (the product of all dimensions but the last)");
        return Err(Error::shape(expected, rows.to_string()));
    }
    Ok(())
}

fn product_of(sizes: [usize; 3]) -> usize {
    sizes.iter().product()
}

impl Convolution {
    fn taps(&self) -> usize {
        product_of(self.kernel)
    }
    fn input_image(&self) -> Image {
        Image { batch: self.batch, pixels: self.input, channels: self.channels[0] }
    }
    fn output_image(&self) -> Image {
        Image { batch: self.batch, pixels: self.output, channels: self.channels[1] }
    }
    fn group_channels(&self) -> [usize; 2] {
        self.channels.map(|channels| channels / self.groups)
    }

    /// # Errors
    /// [`Error::Shape`] for sizes that describe no convolution.
    pub fn check(&self) -> Result<()> {
        let Self { batch, channels, groups, input, output, kernel, stride, padding, dilation } = *self;
        let below = |n: usize| n < 1 << 31;
        let positive = groups > 0 && [stride, dilation, kernel].iter().flatten().all(|&n| n > 0);
        // Each by itself, too: a size of zero makes any product small.
        let small = [input, output, kernel, stride, padding, dilation].iter().flatten().all(|&n| below(n))
            && [input, output, kernel].iter().all(|sizes| element_count(sizes).is_ok_and(below));
        if !(positive && small && below(batch) && channels.iter().all(|c| c % groups == 0)) {
            let expected = "positive strides, dilations and taps, channels in whole groups, fewer than 2^31 samples, \
                            pixels and taps, and strides, dilations and padding below 2^31";
            return Err(Error::shape(expected, format!("{self:?}")));
        }
        for (pixels, channels) in [(input, channels[0]), (output, channels[1])] {
            element_count(&[batch, product_of(pixels), channels, ROOM])?;
        }
        element_count(&[channels[1], channels[0] / groups, product_of(kernel), ROOM])?;
        Ok(())
    }

    fn check_kernel(&self, w: &Kernel<'_>, taps: Taps, coding: Coding) -> Result<()> {
        let [k0, k1, k2] = self.kernel;
        let expected = [self.channels[1], self.group_channels()[0], k0, k1, k2];
        match w {
            Kernel::Floats(w) if w.shape() != expected => {
                Err(Error::shape(format!("a kernel of shape {expected:?}"), format!("{:?}", w.shape())))
            }
            Kernel::Kept(kept) => {
                let [outs, channels, ..] = expected;
                let fits = kept.layout.shape() == [outs, channels, self.taps()] && kept.groups == self.groups;
                if !fits || !kept.serves(taps) {
                    let expected = format!("a kernel of shape {expected:?} in {} groups, kept for it", self.groups);
                    return Err(Error::shape(expected, format!("{:?}", kept.layout)));
                }
                if kept.layout.format() != coding.format {
                    let expected = format!("a kernel in {}, as it is multiplied", coding.format);
                    return Err(Error::format(expected, kept.layout.format().to_string()));
                }
                Ok(())
            }
            Kernel::Floats(_) => element_count(&expected[..4]).and_then(|rows| check_rows(rows, "kernel")),
        }
    }

    /// From pixels of Y to those of X.
    fn reach(&self) -> Reach {
        Reach::new(&self.axis_reach())
    }

    /// The same for each dimension by itself.
    fn axis_reach(&self) -> AxisReach {
        AxisReach::new(self.output, self.kernel, self.input, |d, o, k| {
            let p = (o * self.stride[d] + k * self.dilation[d]).checked_sub(self.padding[d])?;
            (p < self.input[d]).then_some(p)
        })
    }

    /// From pixels of X to those of Y.
    fn reverse(&self) -> Reach {
        Reach::new(&AxisReach::new(self.input, self.kernel, self.output, |d, p, k| {
            let distance = (p + self.padding[d]).checked_sub(k * self.dilation[d])?;
            let o = distance / self.stride[d];
            (distance % self.stride[d] == 0 && o < self.output[d]).then_some(o)
        }))
    }

    /// Y [batch, output pixels, out channels] ← X [batch, input pixels, in channels] with kernel w, plus bias.
    /// `flatten`: blocks run over the flattened patch. The coding of a kept kernel tells its format alone.
    ///
    /// # Errors
    /// [`Error::Shape`] when sizes do not fit; [`Error::Format`] for tiles and whole tensors, and for a kernel that is kept
    /// in another format.
    pub fn forward(
        &self,
        ctx: &Context<'_>,
        x: &[f32],
        w: Kernel<'_>,
        codings: [Coding; 2],
        flatten: bool,
        bias: Option<&[f32]>,
        out: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.by_pixels(ctx, x, w, Taps::Forward, codings, flatten, bias, out, workspace)
    }

    /// dX [batch, input pixels, in channels] ← dY [batch, output pixels, out channels] with kernel w: also the forward
    /// product of a transposed convolution, which may have a bias.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn input_gradient(
        &self,
        ctx: &Context<'_>,
        dy: &[f32],
        w: Kernel<'_>,
        codings: [Coding; 2],
        bias: Option<&[f32]>,
        out: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.by_pixels(ctx, dy, w, Taps::Backward, codings, false, bias, out, workspace)
    }

    fn check_formats(codings: [Coding; 2], k: usize) -> Result<usize> {
        for Coding { format, .. } in codings {
            if !matches!(format.shape(), BlockShape::Line(_)) {
                return Err(Error::format("blocks in lines for a convolution", format.to_string()));
            }
        }
        let [left, right] = codings.map(|coding| coding.format);
        let block = left.block_along(k);
        if block != right.block_along(k) {
            return Err(Error::shape(format!("equal blocks: {left} has {block}"), right.to_string()));
        }
        Ok(block)
    }
}

/// Fills, the tasks of `before` among the fillings, then multiplies, in one region.
fn run_stages(
    ctx: &Context<'_>,
    workers: usize,
    before: Stage<'_>,
    fillings: &Fillings<'_>,
    scratch: &[Mutex<Scratch>],
    tasks: usize,
    multiply: &(dyn Fn(usize, usize) + Sync),
) -> Result<()> {
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let lay_out = |worker: usize, task: usize| {
        if task < before.tasks {
            return (before.task)(worker, task);
        }
        let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: tasks are handed out once.
        if let Err(error) = unsafe { fillings.run(ctx, task - before.tasks, &mut scratch) } {
            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    };
    let stages = [Stage { tasks: before.tasks + fillings.tasks(), task: &lay_out }, Stage { tasks, task: multiply }];
    for_each_stage(ctx.team, workers, &stages);
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Nothing to do before the fillings.
const NOTHING: Stage<'static> = Stage { tasks: 0, task: &|_, _| {} };

/// Which way taps lead.
#[derive(Clone, Copy)]
enum Taps {
    Forward,
    Backward,
}

/// Sizes of tasks.
#[derive(Clone, Copy)]
struct Plan {
    row_panels: usize,
    column_panels: usize,
    /// Pieces of the reduction per pass.
    pieces: usize,
}

impl Plan {
    fn new(
        al: &PanelLayout,
        bl: &PanelLayout,
        row_panels: usize,
        pieces: usize,
        products: usize,
        workers: usize,
        wide: bool,
    ) -> Self {
        let caches = Caches::get();
        // Half of the first level for B, half of the second for A.
        let depth = (caches.l1 / 2 / bl.plain_block_bytes()).max(1024 / al.block);
        let depth = if wide { driver::WIDE_DEPTH / al.block } else { depth };
        let pieces = (depth / al.blocks).clamp(1, pieces.max(1));
        let most = (caches.l2 / 2 / (pieces * al.blocks * al.block_bytes)).clamp(4, 128);
        let column_panels = 16.min(bl.panels.max(1));
        let products = products * bl.panels.div_ceil(column_panels);
        // Every task reads B anew, and a unit has it laid out, which takes as long as so many panels of A.
        let (together, right) = if wide { (aligned::PANELS, 2 * aligned::PANELS) } else { (1, 4) };
        let longest = |panels: usize| {
            let tasks = products * row_panels.div_ceil(panels);
            tasks.div_ceil(workers) * (panels.min(row_panels) + right)
        };
        let sizes = (1..=most.min(row_panels) / together).map(|n| n * together).rev();
        let row_panels = sizes.min_by_key(|&panels| longest(panels)).unwrap_or(row_panels.max(1));
        Self { row_panels, column_panels, pieces }
    }
}
