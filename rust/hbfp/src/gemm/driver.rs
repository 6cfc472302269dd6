//! Tiles of C over panels: how a product is cut up for caches and threads.
//!
//! One parallel region lays out the operands strip by strip and then multiplies. A task of the product is some panels of
//! A against some panels of B. Within it, a B panel of [`Plan::depth`] elements of the reduction stays in the
//! first-level cache while the A panels, in the second level, pass by.
#![allow(unsafe_code, reason = "calls of kernels, and tasks that write disjoint tiles")]
#![allow(clippy::too_many_arguments, reason = "a product: two operands, the output, its epilogue and its kernel")]

use super::cache::Caches;
use super::{Epilogue, general};
use crate::arch::generic::product::{PANEL_ROWS, RIDER, Tile, b_block_bytes};
use crate::arch::kernels::{TileFn, TileKernel};
use crate::encode::Context;
use crate::encode::blocks::Scratch;
use crate::encode::codes::Codes;
use crate::encode::panels::{Fillings, Form, Job, PanelLayout, PanelsRef, reserve_scratch};
use crate::error::{Error, Result};
use crate::format::{BlockFormat, EXPONENT_OFFSET};
use crate::mem::{AlignedBytes, SharedMut};
use crate::parallel::{Stage, for_each_stage};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Rows of C up to which a product reads nibbles directly: two A panels, each of which unpacks them anew.
pub(super) const NIBBLE_ROWS: usize = 2 * PANEL_ROWS;
/// Multiply-accumulates, and elements to encode, below which a product runs on the calling thread.
pub(super) const SERIAL_MACS: usize = 1 << 22;
const SERIAL_ELEMENTS: usize = 1 << 18;
/// Tasks for each thread, so that all end together.
const TASKS_PER_WORKER: usize = 8;

/// The right operand of [`multiply`].
pub(super) enum Right<'a> {
    Packed(PanelsRef),
    Fresh(Job<'a>),
}

/// The kernel of a product; without one, every tile takes the general path.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub(super) tile: Option<&'static TileKernel>,
    pub(super) from_nibbles: bool,
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

impl Plan {
    /// For panels of which `encoded` elements are still to be laid out.
    fn new(ctx: &Context<'_>, al: &PanelLayout, bl: &PanelLayout, encoded: usize) -> Self {
        let caches = Caches::get();
        let macs = al.matrices.saturating_mul(al.lines).saturating_mul(bl.lines).saturating_mul(al.k.max(1));
        let small = macs < SERIAL_MACS && encoded < SERIAL_ELEMENTS;
        let workers = if small { 1 } else { ctx.threads.max(1) };
        // Half of the first level for B; a few rows pass over B but once.
        let b_block = b_block_bytes(bl.steps, bl.width);
        let depth = if al.panels <= 2 { al.blocks } else { (caches.l1 / 2 / b_block).max(1024 / al.block) };
        let depth = depth.clamp(1, al.blocks.max(1));
        // Most of the second level for A, the rest for what passes through it; tasks of equal size.
        let most = (caches.l2 * 5 / 8 / (depth * al.block_bytes)).clamp(8, 256);
        let mut row_panels = al.panels.div_ceil(al.panels.div_ceil(most));
        let mut column_panels = 16.min(bl.panels);
        if workers > 1 {
            let tasks = |r: usize, c: usize| al.matrices * al.panels.div_ceil(r) * bl.panels.div_ceil(c);
            while tasks(row_panels, column_panels) < TASKS_PER_WORKER * workers && (row_panels > 8 || column_panels > 1)
            {
                if column_panels > 1 {
                    column_panels = column_panels.div_ceil(2);
                } else {
                    row_panels = row_panels.div_ceil(2);
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
    let plan = Plan::new(ctx, &al, &bl, encoded);
    let a = left.panels.as_ref();
    let (b, fresh) = match right {
        Right::Packed(b) => (b, None),
        Right::Fresh(job) => (job.panels.as_ref(), Some(job)),
    };
    let together = 1 + usize::from(kept.is_some());
    let fillings = Fillings::new(ctx, [Some(left), kept, fresh].into_iter().flatten(), together);
    let row_tasks = al.panels.div_ceil(plan.row_panels);
    let column_tasks = bl.panels.div_ceil(plan.column_panels);
    let out = SharedMut::new(out);
    let tiles = Tiles::new(ctx, kernel, al, bl, out, epilogue);
    let product = Product { a, b, tiles };
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
        let (r, c) = (rest % row_tasks * plan.row_panels, rest / row_tasks * plan.column_panels);
        let mut scratch = scratch[worker].lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = Buffer::default();
        for pass in 0..passes {
            let blocks = pass * plan.depth..((pass + 1) * plan.depth).min(al.blocks);
            let slice = Slice { blocks, first: pass == 0, last: pass + 1 == passes };
            for j in c..(c + plan.column_panels).min(bl.panels) {
                let b = product.right_panel(matrix, j, &slice, &mut scratch.panel);
                for i in r..(r + plan.row_panels).min(al.panels) {
                    product.tile(matrix, i, j, b, &slice, &mut buffer);
                }
            }
        }
    };
    let stages = [
        Stage { tasks: fillings.tasks(), task: &lay_out },
        Stage { tasks: al.matrices * row_tasks * column_tasks, task: &multiply },
    ];
    for_each_stage(ctx.team, plan.workers, &stages);
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Widest B panel.
const MAX_COLUMNS: usize = 32;

/// A tile on its own.
#[repr(align(64))]
pub(super) struct Buffer([f32; PANEL_ROWS * MAX_COLUMNS]);

impl Default for Buffer {
    fn default() -> Self {
        Self([0.0; PANEL_ROWS * MAX_COLUMNS])
    }
}

/// Blocks of the reduction that a pass takes.
struct Slice {
    blocks: std::ops::Range<usize>,
    first: bool,
    last: bool,
}

/// Some blocks of a panel.
#[derive(Clone, Copy)]
pub(super) struct PanelBlocks {
    pub(super) bytes: *const u8,
    pub(super) general: bool,
}

/// Where a tile lies in C.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Its first element.
    pub(super) at: usize,
    /// Elements from a row to the next.
    pub(super) stride: usize,
    pub(super) height: usize,
    pub(super) width: usize,
    /// Its first column, for the bias.
    pub(super) column: usize,
    /// Whether these are its first blocks.
    pub(super) first: bool,
    /// Whether these are its last blocks, and something is left to do after them: see [`Tiles::finishes`].
    pub(super) finish: bool,
}

/// What writes tiles of C.
pub(super) struct Tiles<'a> {
    ctx: &'a Context<'a>,
    pub(super) al: PanelLayout,
    pub(super) bl: PanelLayout,
    out: SharedMut<'a, f32>,
    epilogue: Epilogue<'a>,
    /// For tiles of one to four rows.
    run: Option<[TileFn; PANEL_ROWS]>,
    from_nibbles: bool,
}

impl<'a> Tiles<'a> {
    pub(super) fn new(
        ctx: &'a Context<'a>,
        kernel: Kernel,
        al: PanelLayout,
        bl: PanelLayout,
        out: SharedMut<'a, f32>,
        epilogue: Epilogue<'a>,
    ) -> Self {
        let run = kernel.tile.map(|tile| [1, 2, 3, 4].map(|rows| (tile.for_block)(al.steps, rows)));
        Self { ctx, al, bl, out, epilogue, run, from_nibbles: kernel.from_nibbles }
    }

    /// Whether a tile, some of whose blocks needed the general product, or none, has last steps.
    pub(super) fn finishes(&self, general: bool) -> bool {
        general || self.epilogue.accumulate || self.epilogue.bias.is_some()
    }

    /// `blocks` blocks of a B panel, unpacked into `buffer` unless the kernel takes them as they are.
    pub(super) fn right_panel(&self, panel: PanelBlocks, blocks: usize, buffer: &mut AlignedBytes) -> PanelBlocks {
        if self.bl.form == Form::Bytes || self.from_nibbles {
            return panel;
        }
        PanelBlocks { bytes: self.unpack(panel.bytes, blocks, buffer), ..panel }
    }

    fn unpack(&self, nibbles: *const u8, blocks: usize, buffer: &mut AlignedBytes) -> *const u8 {
        let out = buffer.reserve(blocks * b_block_bytes(self.bl.steps, self.bl.width));
        // SAFETY: `blocks` blocks of nibbles lie there, and the buffer has room for as many of bytes.
        unsafe { (self.ctx.kernels.unpack_nibbles)(blocks, self.bl.steps, nibbles, out.as_ptr()) };
        out.as_ptr()
    }

    /// One tile of C over some blocks; one that sticks out goes through a buffer.
    ///
    /// # Safety
    /// The panels hold `blocks` blocks of the layouts; the tile belongs to one task.
    #[inline]
    pub(super) unsafe fn tile(&self, a: PanelBlocks, b: PanelBlocks, blocks: usize, place: Place, buffer: &mut Buffer) {
        let Self { al, bl, .. } = self;
        let Place { at, stride, height, width, column, first, finish } = place;
        let columns = bl.width;
        let c = self.out.pointer(at, (height - 1) * stride + width);
        // SAFETY: a tile belongs to one task, and each of its rows is taken once at a time.
        let row = |r: usize| unsafe { self.out.part(at + r * stride, width) };
        let fresh = first && !self.epilogue.accumulate;
        let general = a.general | b.general;
        let run = self.run.filter(|_| !general && blocks > 0).map(|run| run[height - 1]);
        // Every second access to a row off its register's alignment would touch two cache lines, block after block.
        let in_place = width == columns && (c as usize | (4 * stride)).is_multiple_of(32);
        if let (Some(run), true) = (run, in_place) {
            // SAFETY: the caller's word; the kernel writes as many rows as there are.
            unsafe { run(blocks, al.steps, a.bytes, b.bytes, Tile { c, stride, fresh }) };
        } else {
            let buffer = &mut buffer.0[..PANEL_ROWS * columns];
            for (r, to) in buffer.chunks_exact_mut(columns).take(height).enumerate() {
                if fresh { to.fill(0.0) } else { to[..width].copy_from_slice(row(r)) }
            }
            let tile = Tile { c: buffer.as_mut_ptr(), stride: columns, fresh: false };
            match run {
                // SAFETY: as above; the buffer has 4 rows.
                Some(run) => unsafe { run(blocks, al.steps, a.bytes, b.bytes, tile) },
                None => self.general_tile(a.bytes, b.bytes, blocks, buffer),
            }
            for (r, from) in buffer.chunks_exact(columns).take(height).enumerate() {
                row(r).copy_from_slice(&from[..width]);
            }
        }
        if finish {
            let bias = self.epilogue.bias.map(|bias| &bias[column..][..width]);
            for r in 0..height {
                for (c, x) in row(r).iter_mut().enumerate() {
                    *x = general::finish(*x, bias.map(|bias| bias[c]));
                }
            }
        }
    }

    #[cold]
    fn general_tile(&self, a: *const u8, b: *const u8, blocks: usize, tile: &mut [f32]) {
        if blocks == 0 {
            return;
        }
        let mut buffer = AlignedBytes::default();
        let b = if self.from_nibbles { self.unpack(b, blocks, &mut buffer) } else { b };
        let b_block = b_block_bytes(self.bl.steps, self.bl.width);
        // SAFETY: the panels were laid out with these layouts.
        let (a, b) = unsafe {
            (
                std::slice::from_raw_parts(a, blocks * self.al.block_bytes),
                std::slice::from_raw_parts(b, blocks * b_block),
            )
        };
        general::tile(&self.al, &self.bl, a, b, tile);
    }
}

struct Product<'a> {
    a: PanelsRef,
    b: PanelsRef,
    tiles: Tiles<'a>,
}

impl Product<'_> {
    fn right_panel(&self, matrix: usize, j: usize, slice: &Slice, buffer: &mut AlignedBytes) -> PanelBlocks {
        let bl = &self.tiles.bl;
        let panel = bl.panel(if bl.shared { 0 } else { matrix }, j);
        // SAFETY: a panel of the layout, written by the stage before.
        let general = unsafe { self.b.is_general(panel) };
        let bytes = self.b.bytes.wrapping_add(panel * bl.panel_bytes() + slice.blocks.start * bl.block_bytes);
        self.tiles.right_panel(PanelBlocks { bytes, general }, slice.blocks.len(), buffer)
    }

    fn tile(&self, matrix: usize, i: usize, j: usize, b: PanelBlocks, slice: &Slice, buffer: &mut Buffer) {
        let Tiles { al, bl, .. } = &self.tiles;
        let (m, n, column) = (al.lines, bl.lines, j * bl.width);
        let panel = al.panel(matrix, i);
        // SAFETY: a panel of the layout, written by the stage before.
        let general = unsafe { self.a.is_general(panel) };
        let place = Place {
            at: (matrix * m + i * PANEL_ROWS) * n + column,
            stride: n,
            height: PANEL_ROWS.min(m - i * PANEL_ROWS),
            width: bl.width.min(n - column),
            column,
            first: slice.first,
            finish: slice.last && self.tiles.finishes(general | b.general),
        };
        let bytes = self.a.bytes.wrapping_add(panel * al.panel_bytes() + slice.blocks.start * al.block_bytes);
        // SAFETY: the panels were laid out with these layouts; a tile belongs to one task.
        unsafe { self.tiles.tile(PanelBlocks { bytes, general }, b, slice.blocks.len(), place, buffer) };
    }
}

/// Codes of a packed right operand. Blocks of zeros come back with another exponent, which no product can tell.
pub(super) fn codes_of_panels(layout: &PanelLayout, panels: PanelsRef, format: BlockFormat) -> Codes {
    let PanelLayout { matrices, lines, k, block, width, steps, blocks, form, .. } = *layout;
    let nibbles = form == Form::Nibbles;
    let mut codes = vec![0i16; matrices * lines * k];
    let mut exponents = vec![0u8; matrices * lines * blocks];
    // SAFETY: the panels were laid out with this layout.
    let bytes = unsafe { std::slice::from_raw_parts(panels.bytes, layout.bytes()) };
    for (row, (matrix, line)) in (0..matrices).flat_map(|matrix| (0..lines).map(move |line| (matrix, line))).enumerate()
    {
        let panel = &bytes[layout.panel_at(matrix, line / width)..][..blocks * layout.block_bytes];
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
