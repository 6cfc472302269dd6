//! Tiles of C over panels: how a product is cut up for caches and threads.
//!
//! A task is up to [`ROW_PANELS`] panels of A (256 rows) against some panels of B. Within it, a B panel of [`DEPTH`]
//! elements of the reduction stays in the first-level cache while the A panels, in the second level, pass by.
#![allow(unsafe_code, reason = "calls of kernels, and tasks that write disjoint tiles")]
#![allow(clippy::too_many_arguments, reason = "a product: two operands, their layouts, the output and its epilogue")]

use super::{Epilogue, general};
use crate::arch::generic::product::{PANEL_ROWS, RIDER};
use crate::arch::kernels::TileKernel;
use crate::encode::Context;
use crate::encode::codes::Codes;
use crate::encode::panels::{PanelLayout, Panels};
use crate::format::{BlockFormat, EXPONENT_OFFSET};
use crate::mem::SharedMut;
use crate::parallel::for_each_task;

/// Panels of A that a task takes.
const ROW_PANELS: usize = 64;
/// Panels of B that a task takes, at most.
const COLUMN_PANELS: usize = 16;
/// Elements of the reduction per pass over a task's panels.
const DEPTH: usize = 1024;
/// Multiply-accumulates below which a product runs on the calling thread.
const SERIAL_MACS: usize = 1 << 22;

#[repr(align(64))]
struct Tile([f32; PANEL_ROWS * 32]);

/// `out` ← products of all matrices.
pub(super) fn multiply(
    ctx: &Context<'_>,
    a: &Panels,
    al: PanelLayout,
    b: &Panels,
    bl: PanelLayout,
    out: &mut [f32],
    epilogue: Epilogue<'_>,
    kernel: Option<&TileKernel>,
) {
    let (m, n) = (al.lines, bl.lines);
    debug_assert_eq!((al.blocks, al.steps), (bl.blocks, bl.steps));
    debug_assert!(bl.shared || al.matrices == bl.matrices);
    assert_eq!(out.len(), al.matrices * m * n);
    let macs = al.matrices.saturating_mul(m).saturating_mul(n).saturating_mul(al.k.max(1));
    let workers = if macs < SERIAL_MACS { 1 } else { ctx.threads.max(1) };
    // Enough tasks for all threads to end together.
    let mut row_panels = ROW_PANELS.min(al.panels);
    let mut column_panels = COLUMN_PANELS.min(bl.panels);
    if workers > 1 {
        let tasks = |r: usize, c: usize| al.matrices * al.panels.div_ceil(r) * bl.panels.div_ceil(c);
        while tasks(row_panels, column_panels) < 8 * workers && (row_panels > 8 || column_panels > 1) {
            if column_panels > 1 {
                column_panels = column_panels.div_ceil(2)
            } else {
                row_panels = row_panels.div_ceil(2)
            }
        }
    }
    let (row_tasks, column_tasks) = (al.panels.div_ceil(row_panels), bl.panels.div_ceil(column_panels));
    let run = kernel.map(|kernel| (kernel.for_steps)(al.steps));
    let depth = (DEPTH / al.block).max(1);
    let passes = al.blocks.div_ceil(depth).max(1);
    let out = SharedMut::new(out);
    let job = Job { a, al, b, bl, out, epilogue, run };
    for_each_task(ctx.team, workers, al.matrices * row_tasks * column_tasks, &|_, task| {
        let (matrix, rest) = (task / (row_tasks * column_tasks), task % (row_tasks * column_tasks));
        let (r, c) = (rest % row_tasks * row_panels, rest / row_tasks * column_panels);
        let mut tile = Tile([0.0; PANEL_ROWS * 32]);
        for pass in 0..passes {
            let blocks = pass * depth..((pass + 1) * depth).min(al.blocks);
            for j in c..(c + column_panels).min(bl.panels) {
                for i in r..(r + row_panels).min(al.panels) {
                    job.tile(matrix, i, j, blocks.clone(), pass == 0, pass + 1 == passes, &mut tile);
                }
            }
        }
    });
}

struct Job<'a> {
    a: &'a Panels,
    al: PanelLayout,
    b: &'a Panels,
    bl: PanelLayout,
    out: SharedMut<'a, f32>,
    epilogue: Epilogue<'a>,
    run: Option<crate::arch::kernels::TileFn>,
}

impl Job<'_> {
    /// One tile of C over some blocks: through a buffer, which a stride of a power of two can't push out of the cache.
    #[inline]
    fn tile(
        &self,
        matrix: usize,
        i: usize,
        j: usize,
        blocks: std::ops::Range<usize>,
        first: bool,
        last: bool,
        tile: &mut Tile,
    ) {
        let Self { al, bl, .. } = self;
        let (m, n, columns) = (al.lines, bl.lines, bl.width);
        let (height, width) = (PANEL_ROWS.min(m - i * PANEL_ROWS), columns.min(n - j * columns));
        let at = (matrix * m + i * PANEL_ROWS) * n + j * columns;
        let tile = &mut tile.0[..PANEL_ROWS * columns];
        if first && !self.epilogue.accumulate {
            tile.fill(0.0);
        } else {
            for r in 0..height {
                // SAFETY: a tile belongs to one task.
                let row = unsafe { self.out.part(at + r * n, width) };
                tile[r * columns..r * columns + width].copy_from_slice(row);
            }
        }
        let (ap, bp) = (matrix * al.panels + i, if bl.shared { 0 } else { matrix * bl.panels } + j);
        let general = self.a.general[ap] | self.b.general[bp] != 0;
        let (a_at, b_at) = (
            ap * al.panel_bytes() + blocks.start * al.block_bytes,
            bp * bl.panel_bytes() + blocks.start * bl.block_bytes,
        );
        debug_assert!(a_at + blocks.len() * al.block_bytes <= self.a.bytes.capacity());
        debug_assert!(b_at + blocks.len() * bl.block_bytes <= self.b.bytes.capacity());
        // SAFETY: the panels were laid out with these layouts, so the blocks lie inside both buffers; the tile has
        // 4 × columns elements.
        unsafe {
            let (a, b) = (self.a.bytes.as_ptr().wrapping_add(a_at), self.b.bytes.as_ptr().wrapping_add(b_at));
            match self.run {
                Some(run) if !general => run(blocks.len(), al.steps, a, b, tile.as_mut_ptr()),
                _ if blocks.is_empty() => {}
                _ => {
                    let a = std::slice::from_raw_parts(a, blocks.len() * al.block_bytes);
                    let b = std::slice::from_raw_parts(b, blocks.len() * bl.block_bytes);
                    general::tile(al.steps, columns, bl.offset, a, b, tile);
                }
            }
        }
        let finishes = last && (general || self.epilogue.accumulate || self.epilogue.bias.is_some());
        for r in 0..height {
            // SAFETY: a tile belongs to one task.
            let row = unsafe { self.out.part(at + r * n, width) };
            let sums = &tile[r * columns..r * columns + width];
            if finishes {
                for (c, (out, &sum)) in row.iter_mut().zip(sums).enumerate() {
                    *out = general::finish(sum, self.epilogue.bias.map(|bias| bias[j * columns + c]));
                }
            } else {
                row.copy_from_slice(sums);
            }
        }
    }
}

/// Codes of a packed right operand. Blocks of zeros come back with another exponent, which no product can tell.
pub(super) fn codes_of_panels(layout: &PanelLayout, panels: &Panels, format: BlockFormat) -> Codes {
    let PanelLayout { lines, k, block, width, steps, blocks, .. } = *layout;
    let mut codes = vec![0i16; lines * k];
    let mut exponents = vec![0u8; lines * blocks];
    // SAFETY: the panels were laid out with this layout.
    let bytes = unsafe { std::slice::from_raw_parts(panels.bytes.as_ptr(), layout.bytes()) };
    for line in 0..lines {
        for b in 0..blocks {
            let from = &bytes[line / width * layout.panel_bytes() + b * layout.block_bytes..][..layout.block_bytes];
            for j in 0..block.min(k - b * block) {
                let byte = from[4 * (j / 4 * width + line % width) + j % 4];
                codes[line * k + b * block + j] = i16::from(byte) - layout.offset as i16;
            }
            let end = &from[4 * (width * steps + line % width)..][..4];
            let rider = i32::from_le_bytes(end.try_into().expect("four bytes")).wrapping_sub(RIDER);
            exponents[line * blocks + b] = ((rider >> 23) + EXPONENT_OFFSET) as u8;
        }
    }
    Codes { format, matrices: 1, lines, k, block, codes, exponents }
}
