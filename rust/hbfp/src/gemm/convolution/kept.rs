//! Kernels whose codes are laid out once for many products: what a frozen model holds.
//!
//! Panels of a group follow those of the group before, and in each a tap follows another, in the kernel's order. A product
//! that meets all taps reads them as they lie; others have the taps that they meet put together, still as codes.
#![allow(unsafe_code, reason = "tasks that write disjoint panels")]

use super::Taps;
use crate::encode::codes::Codes;
use crate::encode::filling::{Job, Source, fill};
use crate::encode::panels::{PanelLayout, Panels, PanelsRef, Side};
use crate::encode::{Context, check_size};
use crate::error::{Error, Result};
use crate::format::{BlockShape, MAX_BLOCK};
use crate::gemm::{ROOM, driver, offset};
use crate::parallel::for_each_task;
use crate::shape::{PlaneLayout, element_count};

/// A kernel that [`keep_kernel`] laid out.
#[derive(Clone, Copy, Debug)]
pub struct KeptKernel<'a> {
    /// Of the kernel [out, in / groups, taps], blocked along 1 for [`super::Convolution::forward`], along 0 for
    /// [`super::Convolution::input_gradient`].
    pub layout: &'a PlaneLayout,
    /// Groups of the convolution.
    pub groups: usize,
    /// [`kept_kernel_bytes`] bytes, as the same level wrote them.
    pub bytes: &'a [u8],
}

/// Elements of the reduction at a tap below which a kernel is not kept: panels would hold more padding than codes, and
/// products of few channels are put together from patches or lines of floats.
const FEWEST: usize = 16;

/// The panels of a group. None: the kernel can't be kept.
fn panels_of(ctx: &Context<'_>, layout: &PlaneLayout, groups: usize) -> Option<PanelLayout> {
    let (&[outs, channels, taps], BlockShape::Line(n)) = (layout.shape(), layout.format().shape()) else { return None };
    if groups == 0 || !outs.is_multiple_of(groups) {
        return None;
    }
    let [lines, k] = match layout.axis {
        1 => [outs / groups, channels],
        // The planes' blocks go on where a group ends.
        0 if groups == 1 || (outs / groups).is_multiple_of(n) => [channels, outs / groups],
        _ => return None,
    };
    let format = layout.format();
    if !format.encodes_to_panels() || n > MAX_BLOCK || k < FEWEST {
        return None;
    }
    if element_count(&[outs, channels, taps, ROOM]).ok()? == 0 {
        return None;
    }
    let width = ctx.kernels.columns_for(lines);
    let side = Side::Right { offset: offset(format.bits()) };
    let panels = PanelLayout::new([taps, lines, k], format.block_along(k), width, side).in_pieces();
    // Nibbles are unpacked two registers at a time.
    Some(if format.bits() <= 4 && width == ctx.kernels.columns { panels.in_nibbles() } else { panels })
}

/// Bytes of a group's panels; those that fill up a strip are left away.
fn group_bytes(panels: &PanelLayout) -> usize {
    panels.panels * panels.panel_bytes()
}

/// Bytes of a kernel as [`keep_kernel`] lays it out at the level of `ctx`. None: it can't be kept.
#[must_use]
pub fn kept_kernel_bytes(ctx: &Context<'_>, layout: &PlaneLayout, groups: usize) -> Option<usize> {
    let panels = panels_of(ctx, layout, groups)?;
    Some(groups * (group_bytes(&panels) + panels.panels))
}

fn expect_kept(ctx: &Context<'_>, layout: &PlaneLayout, groups: usize, len: usize) -> Result<PanelLayout> {
    let (Some(panels), Some(expected)) = (panels_of(ctx, layout, groups), kept_kernel_bytes(ctx, layout, groups))
    else {
        let expected = format!("a kernel of 16 channels or more in each of {groups} groups, in lines of up to 8 bits");
        return Err(Error::shape(expected, format!("{:?} in {}", layout.shape(), layout.format())));
    };
    check_size("bytes of a kept kernel", len, expected)?;
    Ok(panels)
}

/// Where, in the planes' lines, line `line` of group `g` has its codes at a tap: their line, and the first element.
fn place(layout: &PlaneLayout, panels: &PanelLayout, [g, line, tap]: [usize; 3]) -> (usize, usize) {
    let taps = panels.matrices;
    if layout.axis == 1 { ((g * panels.lines + line) * taps + tap, 0) } else { (line * taps + tap, g * panels.k) }
}

/// Calls `each` with the group, its line number among those of all taps, and the place in the planes.
fn for_each_line(layout: &PlaneLayout, panels: &PanelLayout, g: usize, mut each: impl FnMut(usize, (usize, usize))) {
    for tap in 0..panels.matrices {
        for line in 0..panels.lines {
            each(tap * panels.lines + line, place(layout, panels, [g, line, tap]));
        }
    }
}

/// Lays a kernel's planes out in `bytes`.
///
/// # Errors
/// [`Error::Shape`] for planes or bytes of another size and for kernels that can't be kept; [`Error::Code`] for planes that
/// no encoder writes.
pub fn keep_kernel(
    ctx: &Context<'_>,
    layout: &PlaneLayout,
    groups: usize,
    [exponents, mantissas]: [&[u8]; 2],
    bytes: &mut [u8],
) -> Result<()> {
    let panels = expect_kept(ctx, layout, groups, bytes.len())?;
    check_size("exponents", exponents.len(), layout.exponents().iter().product())?;
    check_size("bytes of mantissas", mantissas.len(), layout.mantissas().iter().product())?;
    let all = Codes::from_planes(layout, exponents, mantissas, false)?;
    let PanelLayout { matrices, lines, k, block, blocks, .. } = panels;
    let (rows, all_blocks) = (matrices * lines, all.blocks());
    let (codes, ends) = (vec![0; rows * k], vec![0; rows * blocks]);
    let mut group = Codes { format: layout.format(), matrices, lines, k, block, codes, exponents: ends };
    let (mut memory, mut scratch) = (Panels::default(), Vec::new());
    let (to, flags) = bytes.split_at_mut(groups * group_bytes(&panels));
    for (g, (to, flags)) in
        to.chunks_exact_mut(group_bytes(&panels)).zip(flags.chunks_exact_mut(panels.panels)).enumerate()
    {
        for_each_line(layout, &panels, g, |row, (line, first)| {
            group.codes[row * k..][..k].copy_from_slice(&all.codes[line * all.k + first..][..k]);
            let from = line * all_blocks + first / block;
            group.exponents[row * blocks..][..blocks].copy_from_slice(&all.exponents[from..][..blocks]);
        });
        let source = Source::Codes(&group);
        let job = Job::new(&source, group.format, panels, memory.reserve(&panels));
        fill(ctx, job, &mut scratch)?;
        // SAFETY: panels of this layout were written there.
        to.copy_from_slice(unsafe { std::slice::from_raw_parts(memory.bytes.as_ptr(), to.len()) });
        for (to, flag) in flags.iter_mut().zip(&mut memory.general) {
            *to = *flag.get_mut();
        }
    }
    Ok(())
}

impl<'a> KeptKernel<'a> {
    /// The planes of the kernel's layout: (exponents, mantissas). Blocks of zeros get c = 0.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of bytes than such a kernel has at this level.
    pub fn planes(&self, ctx: &Context<'_>) -> Result<(Vec<u8>, Vec<u8>)> {
        let layout = self.layout;
        let (panels, refs) = self.panels(ctx)?;
        let (format, k) = (layout.format(), layout.k);
        let (lines, block) = (layout.exponents()[0], format.block_along(k));
        let (codes, exponents) = (vec![0; lines * k], vec![0; lines * k.div_ceil(block)]);
        let mut all = Codes { format, matrices: 1, lines, k, block, codes, exponents };
        let (all_blocks, blocks) = (all.blocks(), panels.blocks);
        for (g, of) in refs.into_iter().enumerate() {
            let group = driver::codes_of_panels(&panels, of, format);
            for_each_line(layout, &panels, g, |row, (line, first)| {
                let to = line * k + first;
                all.codes[to..][..panels.k].copy_from_slice(&group.codes[row * panels.k..][..panels.k]);
                let to = line * all_blocks + first / block;
                all.exponents[to..][..blocks].copy_from_slice(&group.exponents[row * blocks..][..blocks]);
            });
        }
        all.clear_zero_blocks();
        Ok(all.to_planes(layout))
    }

    /// The layout of a group's panels, and the panels of each group.
    pub(super) fn panels(&self, ctx: &Context<'_>) -> Result<(PanelLayout, Vec<PanelsRef>)> {
        let panels = expect_kept(ctx, self.layout, self.groups, self.bytes.len())?;
        let size = group_bytes(&panels);
        let (bytes, flags) = self.bytes.split_at(self.groups * size);
        let parts = bytes.chunks_exact(size).zip(flags.chunks_exact(panels.panels));
        Ok((panels, parts.map(PanelsRef::new).collect()))
    }

    /// Whether a block is a NaN block, or might be.
    pub(super) fn has_general(&self, ctx: &Context<'_>) -> Result<bool> {
        let panels = expect_kept(ctx, self.layout, self.groups, self.bytes.len())?;
        Ok(self.bytes[self.groups * group_bytes(&panels)..].iter().any(|&flag| flag != 0))
    }

    /// Whether it is laid out for products that go this way.
    pub(super) fn serves(&self, taps: Taps) -> bool {
        self.layout.axis == if matches!(taps, Taps::Forward) { 1 } else { 0 }
    }
}

/// `panels` with the taps of `order` as their pieces, one after the other, in `memory`: one for each group.
pub(super) fn with_taps(
    ctx: &Context<'_>,
    (panels, of): (PanelLayout, &[PanelsRef]),
    order: &[usize],
    memory: &mut Vec<Panels>,
) -> (PanelLayout, Vec<PanelsRef>) {
    let met = PanelLayout { matrices: order.len(), ..panels };
    let piece = panels.blocks * panels.block_bytes;
    memory.resize_with(memory.len().max(of.len()), Panels::default);
    let targets: Vec<_> = memory.iter_mut().zip(of).map(|(memory, _)| memory.reserve(&met)).collect();
    let elements = of.len() * panels.lines * panels.k * order.len();
    for_each_task(ctx.team, ctx.workers(elements), of.len() * panels.panels, &|_, task| {
        let (g, j) = (task / panels.panels, task % panels.panels);
        // SAFETY: a panel belongs to one task; the one that it is made of has all taps.
        unsafe {
            let to = targets[g].bytes.part(j * met.panel_bytes(), met.panel_bytes());
            for (&tap, to) in order.iter().zip(to.chunks_exact_mut(piece)) {
                let from = of[g].bytes.add(j * panels.panel_bytes() + tap * piece);
                to.copy_from_slice(std::slice::from_raw_parts(from, piece));
            }
            if of[g].is_general(j) {
                targets[g].set_general(j);
            }
        }
    });
    (met, targets.iter().map(|target| target.as_ref()).collect())
}
