//! Batches of small products. A task takes some matrices, one after the other: both operands are encoded to memory of the
//! worker's, which the first-level cache holds, and multiplied before the next matrix comes.
#![allow(unsafe_code, reason = "calls of kernels, and tasks that write the matrices of disjoint runs")]

use super::cache::Caches;
use super::tiles::{Kernel, Left, LeftBlocks, PanelBlocks, Place, Task, Tiles};
use super::{Epilogue, driver};
use crate::arch::generic::aligned;
use crate::arch::generic::encode::{PanelCoding, STRIP};
use crate::arch::generic::philox::{Counters, RANDOM_PADDING};
use crate::arch::generic::product::PANEL_ROWS;
use crate::arch::generic::straight::{Lines, Sizes, block_bytes};
use crate::arch::kernels::MatrixUnitKernels;
use crate::encode::blocks::{Part, Scratch};
use crate::encode::filling::{Filling, Job, Source, reserve_scratch};
use crate::encode::panels::{PanelLayout, Panels, PanelsRef};
use crate::encode::{Context, RoundingMode};
use crate::format::BlockFormat;
use crate::mem::SharedMut;
use crate::parallel::{Serial, for_each_task};
use crate::rng::Seed;
use crate::shape::FloatLines;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Tasks for each thread, so that all end together.
const TASKS_PER_WORKER: usize = 8;
/// Matrices that are laid out in panels together, where these stay in the first-level cache: at most so many.
const MATRICES: usize = 16;
/// Lines that are encoded at once, in whole strips: their random bits stay in the first-level cache.
const LINES: usize = 4 * STRIP;
/// The second-level cache holds as many elements of both operands as [`takes`] admits so many times over.
const SHARE_OF_L2: usize = 16;

/// An operand of all matrices, and the layout of one.
#[derive(Clone, Copy)]
pub(super) struct Side<'a> {
    pub(super) x: &'a FloatLines<'a>,
    pub(super) mode: RoundingMode,
    pub(super) format: BlockFormat,
    pub(super) layout: PanelLayout,
}

/// Whether matrices with these layouts are so small that they are best taken one by one, and so many that all threads have
/// some.
pub(super) fn takes(ctx: &Context<'_>, al: &PanelLayout, bl: &PanelLayout) -> bool {
    let elements = (al.lines + bl.lines).saturating_mul(al.k);
    al.matrices > 1
        && al.matrices == bl.matrices
        && al.matrices >= ctx.threads
        && al.blocks > 0
        && elements <= Caches::get().l2 / SHARE_OF_L2
}

/// `out` ← products of all matrices.
pub(super) fn multiply(
    ctx: &Context<'_>,
    sides: [Side<'_>; 2],
    out: &mut [f32],
    kernel: Kernel,
    scratch: &mut Vec<Mutex<Scratch>>,
) {
    let [al, bl] = sides.map(|side| side.layout);
    let (matrices, [m, n, k]) = (al.matrices, [al.lines, bl.lines, al.k]);
    assert_eq!(out.len(), matrices * m * n);
    debug_assert!(al.blocks == bl.blocks && al.steps == bl.steps && bl.matrices == matrices && !out.is_empty());
    reserve_scratch(ctx, scratch);
    let workers = driver::workers(ctx, matrices * m * n * k, matrices * (m + n) * k, matrices * n * k);
    let together = if workers == 1 { matrices } else { matrices.div_ceil(TASKS_PER_WORKER * workers) };
    let out = SharedMut::new(out);
    let tiles = Tiles::new(ctx, kernel, al, bl, out, Epilogue::default());
    let a_matrix = (al.bytes() + bl.bytes()) / matrices;
    let in_cache = (Caches::get().l1 / a_matrix).clamp(1, MATRICES);
    let straight = Straight::new(ctx, &sides, &kernel);
    for_each_task(ctx.team, workers, matrices.div_ceil(together), &|worker, task| {
        let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        let scratch = &mut *scratch;
        scratch.reserve(al.block);
        let run = task * together..((task + 1) * together).min(matrices);
        let mut run = || match &straight {
            Some(straight) => {
                for matrix in run.clone() {
                    // SAFETY: a matrix of C belongs to one task; the unit is configured.
                    unsafe {
                        if !straight.run(ctx, &sides, matrix, out, scratch) {
                            by_panels(ctx, &sides, matrix..matrix + 1, &tiles, scratch);
                        }
                    }
                }
            }
            None => {
                for first in run.clone().step_by(in_cache) {
                    // SAFETY: a matrix of C belongs to one task.
                    unsafe { by_panels(ctx, &sides, first..(first + in_cache).min(run.end), &tiles, scratch) };
                }
            }
        };
        match &straight {
            // SAFETY: the level has the unit.
            Some(straight) => unsafe { (straight.unit.with)(aligned::PIECE, &mut run) },
            None => run(),
        }
    });
}

/// The way of a matrix unit: no panels between.
struct Straight {
    unit: &'static MatrixUnitKernels,
    sizes: Sizes,
    /// Whether the lines of each operand lie side by side, and how they become codes.
    across: [bool; 2],
    codings: [PanelCoding; 2],
}

impl Straight {
    /// None where there is no unit, or another way is better.
    fn new(ctx: &Context<'_>, sides: &[Side<'_>; 2], kernel: &Kernel) -> Option<Self> {
        let unit = ctx.kernels.matrix_unit.as_ref()?;
        let PanelLayout { steps, blocks, .. } = sides[0].layout;
        // Blocks are filled up to what the unit takes at once.
        if kernel.tile.is_none() || (blocks > 1 && steps < aligned::PIECE / 4) {
            return None;
        }
        let [left, right] = [across(&sides[0])?, across(&sides[1])?];
        let sizes = Sizes { lines: [sides[0].layout.lines, sides[1].layout.lines], blocks, steps };
        let codings = [0, 1].map(|i| PanelCoding::new(sides[i].format, 0, None));
        Some(Self { unit, sizes, across: [left, right], codings })
    }

    /// Whether C of a matrix is done: not so if a line needs the general product.
    ///
    /// # Safety
    /// The matrix belongs to the calling thread, whose unit is configured for pieces of 16 steps.
    unsafe fn run(
        &self,
        ctx: &Context<'_>,
        sides: &[Side<'_>; 2],
        matrix: usize,
        out: SharedMut<'_, f32>,
        scratch: &mut Scratch,
    ) -> bool {
        let Sizes { lines: [m, n], blocks, steps } = self.sizes;
        let bytes = |lines: usize| lines.div_ceil(STRIP) * blocks * block_bytes(steps);
        let a = scratch.tiles.aligned_left.reserve(bytes(m)).as_ptr();
        let b = scratch.tiles.aligned_right.reserve(bytes(n)).as_ptr();
        // SAFETY: the caller's word; the buffers have room for all blocks of the lines.
        unsafe {
            if !(self.encode(ctx, sides, 0, matrix, a, scratch) && self.encode(ctx, sides, 1, matrix, b, scratch)) {
                return false;
            }
            (self.unit.straight.product)(&self.sizes, a, b, out.pointer(matrix * m * n, m * n));
        }
        true
    }

    /// Lays out a matrix of operand `i`. False: a line needs the general product.
    ///
    /// # Safety
    /// `to` is valid for writing all blocks of its lines.
    unsafe fn encode(
        &self,
        ctx: &Context<'_>,
        sides: &[Side<'_>; 2],
        i: usize,
        matrix: usize,
        to: *mut u8,
        scratch: &mut Scratch,
    ) -> bool {
        let Side { x, mode, ref layout, .. } = sides[i];
        let encode = self.unit.straight.encode[i][usize::from(self.across[i])][mode.rounding as usize];
        let PanelLayout { lines, k, block, steps, blocks, .. } = *layout;
        let (across, bytes) = (self.across[i], block_bytes(steps));
        for (first, b) in (0..lines).step_by(LINES).flat_map(|first| (0..blocks).map(move |b| (first, b))) {
            let width = LINES.min(lines - first);
            let part = Part { matrix, line: first, width, k: b * block, n: block.min(k - b * block) };
            let (random, random_stride) = if mode.is_stochastic() {
                random_bits(ctx, x, part, mode.seed, across, &mut scratch.random)
            } else {
                (std::ptr::null(), 0)
            };
            let of = Lines {
                x: x.at(matrix, first, part.k),
                stride: if across { x.k_stride } else { x.line_stride },
                lines: width,
                n: part.n,
                pieces: steps.div_ceil(aligned::PIECE),
                random,
                random_stride,
                group_bytes: blocks * bytes,
            };
            let at = (first / STRIP * blocks + b) * bytes;
            // SAFETY: the caller's word; the part lies inside the view, its random bits are there.
            if unsafe { encode(&of, &self.codings[i], to.add(at)) } {
                return false;
            }
        }
        true
    }
}

/// Random bits of a part: those of its first element, and how far those of the next line, or row, lie.
fn random_bits(
    ctx: &Context<'_>,
    x: &FloatLines<'_>,
    part: Part,
    seed: Seed,
    across: bool,
    out: &mut Vec<u16>,
) -> (*const u16, usize) {
    let Part { line, width, k, n, .. } = part;
    // Columns of the tensor come in groups of eight.
    let (rows, columns) = if across { (n, line..line + width) } else { (width, k..k + n) };
    let group = columns.start / 8;
    let groups = columns.end.div_ceil(8) - group;
    let row_step = if across { x.row_step as u32 } else { 1 };
    let counters = Counters { row: x.random_row(part.matrix, line, k), row_step, rows, group: group as u32, groups };
    out.resize(out.len().max(8 * rows * groups + RANDOM_PADDING), 0);
    // SAFETY: room for the rectangle and its padding.
    unsafe { (ctx.kernels.fill_random)(seed, counters, out.as_mut_ptr()) };
    (out[columns.start % 8..].as_ptr(), 8 * groups)
}

/// Whether the lines of an operand, and their random bits, lie side by side; or, if they don't, whether each is contiguous.
/// None: neither.
fn across(side: &Side<'_>) -> Option<bool> {
    let Side { x, mode, .. } = side;
    let random = |across: bool| !mode.is_stochastic() || x.by_line != across;
    match (x.k_stride, x.line_stride) {
        (1, _) if random(false) => Some(false),
        (_, 1) if random(true) => Some(true),
        _ => None,
    }
}

/// C of some matrices by panels.
///
/// # Safety
/// The matrices belong to the calling thread.
unsafe fn by_panels(
    ctx: &Context<'_>,
    sides: &[Side<'_>; 2],
    run: Range<usize>,
    tiles: &Tiles<'_>,
    scratch: &mut Scratch,
) {
    let mut panels = std::mem::take(&mut scratch.small);
    let [a, b] = [0, 1].map(|i| lay_out(ctx, &sides[i], run.clone(), &mut panels[i], scratch));
    let Tiles { al, bl, .. } = tiles;
    let (m, n) = (al.lines, bl.lines);
    let blocks_of = |of: PanelsRef, layout: &PanelLayout, panel: usize| {
        let bytes = of.bytes.wrapping_add(panel * layout.panel_bytes());
        // SAFETY: a panel that was laid out.
        PanelBlocks { bytes, general: unsafe { of.is_general(panel) } }
    };
    for (i_run, matrix) in run.enumerate() {
        let task = Task {
            number: None,
            blocks: al.blocks,
            rows: 0..al.panels,
            columns: 0..bl.panels,
            left: |i| {
                let PanelBlocks { bytes, general } = blocks_of(a, al, al.panel(i_run, i));
                LeftBlocks { rows: Left::Panel(bytes), general }
            },
            right: |j| blocks_of(b, bl, bl.panel(i_run, j)),
            place: |i, j, general| Place {
                at: (matrix * m + i * PANEL_ROWS) * n + j * bl.width,
                stride: n,
                height: PANEL_ROWS.min(m - i * PANEL_ROWS),
                width: bl.width.min(n - j * bl.width),
                column: j * bl.width,
                first: true,
                last: true,
                finish: tiles.finishes(general),
            },
        };
        // SAFETY: the panels were laid out with these layouts; the matrix belongs to this thread.
        unsafe { task.run(tiles, &mut scratch.tiles) };
    }
    scratch.small = panels;
}

/// Panels of some matrices.
fn lay_out(
    ctx: &Context<'_>,
    side: &Side<'_>,
    run: Range<usize>,
    panels: &mut Panels,
    scratch: &mut Scratch,
) -> PanelsRef {
    let layout = PanelLayout { matrices: run.len(), ..side.layout };
    let x = side.x.matrices_of(run);
    let source = Source::Floats(&x, side.mode);
    let panels = panels.reserve(&layout);
    let ctx = Context { kernels: ctx.kernels, team: &Serial, threads: 1 };
    Filling::new(&ctx, Job::new(&source, side.format, layout, panels))
        .run_all(&ctx, scratch)
        .expect("floats can always be encoded");
    panels.as_ref()
}
