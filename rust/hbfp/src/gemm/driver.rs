//! Tiles of C over panels: how a product is cut up for caches and threads.
//!
//! One parallel region lays out the operands strip by strip and then multiplies. A task of the product is some panels of
//! A against some panels of B. Within it, a B panel of [`Plan::depth`] elements of the reduction stays in the
//! first-level cache while the A panels, in the second level, pass by.
#![allow(unsafe_code, reason = "calls of kernels, and tasks that write disjoint tiles")]
#![allow(clippy::too_many_arguments, reason = "a product: two operands, the output, its epilogue and its kernel")]

use super::Epilogue;
use super::cache::Caches;
use super::tiles::{Kernel, Left, LeftBlocks, PanelBlocks, Place, Task, Tiles};
use crate::arch::generic::aligned::PANELS;
use crate::arch::generic::product::{PANEL_ROWS, RIDER, b_block_bytes};
use crate::encode::Context;
use crate::encode::blocks::Scratch;
use crate::encode::codes::Codes;
use crate::encode::filling::{Fillings, Job, reserve_scratch};
use crate::encode::panels::{Form, PanelLayout, PanelsRef};
use crate::error::{Error, Result};
use crate::format::{BlockFormat, EXPONENT_OFFSET};
use crate::mem::SharedMut;
use crate::parallel::{Stage, for_each_stage};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Rows of C up to which a product reads nibbles directly: two A panels, each of which unpacks them anew.
pub(super) const NIBBLE_ROWS: usize = 2 * PANEL_ROWS;
/// Multiply-accumulates, and elements to encode, below which a product runs on the calling thread.
pub(super) const SERIAL_MACS: usize = 1 << 22;
const SERIAL_ELEMENTS: usize = 1 << 18;
/// Elements of the right operand below which a few rows do: to read them takes longer than to multiply.
const SERIAL_WEIGHTS: usize = 3 << 19;
/// Tasks for each thread, so that all end together.
const TASKS_PER_WORKER: usize = 8;

/// Elements of the reduction, and left panels, of a task of tiles of 32 × 32.
pub(super) const WIDE_DEPTH: usize = 4096;
const WIDE_TASK_PANELS: usize = 128;

/// The right operand of [`multiply`].
pub(super) enum Right<'a> {
    Packed(PanelsRef),
    Fresh(Job<'a>),
}

/// Sizes of tasks, from the shape and the caches.
#[derive(Clone, Copy, Debug)]
struct Plan {
    workers: usize,
    /// A panels of a task.
    row_panels: usize,
    /// B panels of a task.
    column_panels: usize,
    /// Blocks of the reduction per pass over a task's panels.
    depth: usize,
}

/// Threads for so many multiply-accumulates, elements to encode, and elements of the right operand.
pub(super) fn workers(ctx: &Context<'_>, macs: usize, encoded: usize, weights: usize) -> usize {
    let small = macs < SERIAL_MACS && encoded < SERIAL_ELEMENTS && weights < SERIAL_WEIGHTS;
    if small { 1 } else { ctx.threads.max(1) }
}

impl Plan {
    /// For panels of which `encoded` elements are still to be laid out, and which go by `wide` tiles.
    fn new(ctx: &Context<'_>, al: &PanelLayout, bl: &PanelLayout, encoded: usize, wide: bool) -> Self {
        let caches = Caches::get();
        let macs = al.matrices.saturating_mul(al.lines).saturating_mul(bl.lines).saturating_mul(al.k.max(1));
        let weights = bl.matrices.saturating_mul(bl.lines).saturating_mul(bl.k);
        let workers = workers(ctx, macs, encoded, weights);
        // Half of the first level for B; a few rows pass over B but once.
        let b_block = b_block_bytes(bl.steps, bl.width);
        let depth = match (al.panels, wide) {
            (..=2, _) => al.blocks,
            // Such tiles work faster than C comes and goes: few passes over it.
            (_, true) => WIDE_DEPTH / al.block,
            (_, false) => (caches.l1 / 2 / b_block).max(1024 / al.block),
        };
        let depth = depth.clamp(1, al.blocks.max(1));
        // Most of the second level for A, the rest for what passes through it; tasks of equal size.
        let (most, whole) = if wide { (WIDE_TASK_PANELS, PANELS) } else { (256, 1) };
        let most = (caches.l2 * 5 / 8 / (depth * al.block_bytes)).clamp(8, most);
        let mut row_panels = al.panels.div_ceil(al.panels.div_ceil(most)).next_multiple_of(whole);
        let mut column_panels = if wide { 64 } else { 16 }.min(bl.panels);
        if workers > 1 {
            let tasks = |r: usize, c: usize| al.matrices * al.panels.div_ceil(r) * bl.panels.div_ceil(c);
            // Wide: two are the fewest; left panels that come in several passes are laid out for each task anew.
            let fewest = match (wide, depth < al.blocks) {
                (true, true) => 8,
                (true, false) => 2,
                (false, _) => 1,
            };
            while tasks(row_panels, column_panels) < TASKS_PER_WORKER * workers
                && (row_panels > 8 || column_panels > fewest)
            {
                if column_panels > fewest {
                    column_panels = column_panels.div_ceil(2);
                } else {
                    row_panels = row_panels.div_ceil(2).next_multiple_of(whole);
                }
            }
        }
        Self { workers, row_panels, column_panels, depth }
    }
}

/// `out` ← products of all matrices, once the operands are laid out; and `kept`, another encoding of the left tensor.
///
/// # Errors
/// What laying out finds wrong; `out` is untouched then.
pub(super) fn multiply(
    ctx: &Context<'_>,
    left: Job<'_>,
    kept: Option<Job<'_>>,
    right: Right<'_>,
    bl: PanelLayout,
    out: &mut [f32],
    epilogue: Epilogue<'_>,
    kernel: Kernel,
    scratch: &mut Vec<Mutex<Scratch>>,
) -> Result<()> {
    let al = left.layout;
    let (m, n) = (al.lines, bl.lines);
    debug_assert_eq!((al.blocks, al.steps), (bl.blocks, bl.steps));
    debug_assert!(bl.shared || al.matrices == bl.matrices);
    assert_eq!(out.len(), al.matrices * m * n);
    reserve_scratch(ctx, scratch);
    let elements = |layout: &PanelLayout| layout.matrices * layout.lines * layout.k;
    let encoded = elements(&al)
        + kept.as_ref().map_or(0, |job| elements(&job.layout))
        + if let Right::Fresh(job) = &right { elements(&job.layout) } else { 0 };
    let a = left.panels.as_ref();
    let (b, fresh) = match right {
        Right::Packed(b) => (b, None),
        Right::Fresh(job) => (job.panels.as_ref(), Some(job)),
    };
    let together = 1 + usize::from(kept.is_some());
    let fillings = Fillings::new(ctx, [Some(left), kept, fresh].into_iter().flatten(), together);
    let out = SharedMut::new(out);
    let tiles = Tiles::new(ctx, kernel, al, bl, out, epilogue);
    let wide = tiles.wide(al.panels);
    let plan = Plan::new(ctx, &al, &bl, encoded, wide);
    if wide {
        scratch.iter().for_each(|s| s.lock().unwrap_or_else(PoisonError::into_inner).tiles.groups_of = None);
    }
    let row_tasks = al.panels.div_ceil(plan.row_panels);
    let column_tasks = bl.panels.div_ceil(plan.column_panels);
    let passes = al.blocks.div_ceil(plan.depth).max(1);
    let failed = AtomicBool::new(false);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let lay_out = |worker: usize, task: usize| {
        let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: tasks are handed out once.
        if let Err(error) = unsafe { fillings.run(ctx, task, &mut scratch) } {
            failed.store(true, Ordering::Relaxed);
            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    };
    let multiply = |worker: usize, task: usize| {
        if failed.load(Ordering::Relaxed) {
            return;
        }
        let (matrix, rest) = (task / (row_tasks * column_tasks), task % (row_tasks * column_tasks));
        // Wide: what a worker has laid out of its left panels serves its next tasks as well.
        let (r, c) =
            if wide { (rest / column_tasks, rest % column_tasks) } else { (rest % row_tasks, rest / row_tasks) };
        let left_number = matrix * row_tasks + r;
        let (r, c) = (r * plan.row_panels, c * plan.column_panels);
        let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        let (rows, columns) = (r..(r + plan.row_panels).min(al.panels), c..(c + plan.column_panels).min(bl.panels));
        for pass in 0..passes {
            let blocks = pass * plan.depth..((pass + 1) * plan.depth).min(al.blocks);
            // SAFETY: panels of the layouts, written by the stage before.
            let blocks_of = |of: PanelsRef, layout: &PanelLayout, panel: usize| unsafe {
                let at = panel * layout.panel_bytes() + blocks.start * layout.block_bytes;
                PanelBlocks { bytes: of.bytes.wrapping_add(at), general: of.is_general(panel) }
            };
            let (first, last) = (pass == 0, pass + 1 == passes);
            let task = Task {
                blocks: blocks.len(),
                rows: rows.clone(),
                columns: columns.clone(),
                left: |i| {
                    let PanelBlocks { bytes, general } = blocks_of(a, &al, al.panel(matrix, i));
                    LeftBlocks { rows: Left::Panel(bytes), general }
                },
                number: wide.then_some(left_number * passes + pass),
                right: |j| blocks_of(b, &bl, bl.panel(if bl.shared { 0 } else { matrix }, j)),
                place: |i, j, general| Place {
                    at: (matrix * m + i * PANEL_ROWS) * n + j * bl.width,
                    stride: n,
                    height: PANEL_ROWS.min(m - i * PANEL_ROWS),
                    width: bl.width.min(n - j * bl.width),
                    column: j * bl.width,
                    first,
                    last,
                    finish: last && tiles.finishes(general),
                },
            };
            // SAFETY: the panels were laid out with these layouts; a tile belongs to one task.
            unsafe { task.run(&tiles, &mut scratch.tiles) };
        }
    };
    let stages = [
        Stage { tasks: fillings.tasks(), task: &lay_out },
        Stage { tasks: al.matrices * row_tasks * column_tasks, task: &multiply },
    ];
    for_each_stage(ctx.team, plan.workers, &stages);
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Codes of a packed right operand. Blocks of zeros come back with another exponent, which no product can tell.
pub(super) fn codes_of_panels(layout: &PanelLayout, panels: PanelsRef, format: BlockFormat) -> Codes {
    let PanelLayout { matrices, lines, k, block, width, steps, blocks, form, .. } = *layout;
    let nibbles = form == Form::Nibbles;
    let mut codes = vec![0i16; matrices * lines * k];
    let mut exponents = vec![0u8; matrices * lines * blocks];
    for (row, (matrix, line)) in (0..matrices).flat_map(|matrix| (0..lines).map(move |line| (matrix, line))).enumerate()
    {
        let at = layout.panel_at(matrix, line / width);
        // SAFETY: the panels were laid out with this layout.
        let panel = unsafe { std::slice::from_raw_parts(panels.bytes.add(at), blocks * layout.block_bytes) };
        for (b, from) in panel.chunks_exact(layout.block_bytes).enumerate() {
            for j in 0..block.min(k - b * block) {
                let at = |step: usize| 4 * (step * width + line % width) + j % 4;
                let raised = match (nibbles, j / 4 % 2) {
                    (false, _) => from[at(j / 4)],
                    (true, 0) => from[at(j / 8)] & 15,
                    (true, _) => from[at(j / 8)] >> 4,
                };
                codes[row * k + b * block + j] = i16::from(raised) - layout.offset() as i16;
            }
            exponents[row * blocks + b] = if nibbles {
                from[4 * width * steps.div_ceil(2) + line % width]
            } else {
                let end = &from[4 * (width * steps + line % width)..][..4];
                let rider = i32::from_le_bytes(end.try_into().expect("four bytes")).wrapping_sub(RIDER);
                ((rider >> 23) + EXPONENT_OFFSET) as u8
            };
        }
    }
    Codes { format, matrices, lines, k, block, codes, exponents }
}
