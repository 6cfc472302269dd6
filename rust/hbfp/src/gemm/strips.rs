//! Products on the calling thread, strip by strip, for matrices that are never held whole: operands in panels whose
//! memory serves the next strip again, C in rows padded to whole panels, so that every tile is written in place.
#![allow(unsafe_code, reason = "calls of kernels on padded buffers")]

use super::cache::Caches;
use super::{fitting, general, offset};
use crate::arch::generic::product::{Correction, Operands, PANEL_ROWS, Tile};
use crate::arch::kernels::{Kernels, TileFn, TileShape};
use crate::encode::blocks::Scratch;
use crate::encode::panels::{Filling, Job, PanelLayout, Panels, Side, Source};
use crate::encode::{Context, RoundingMode};
use crate::error::{Error, Result};
use crate::format::BlockFormat;
use crate::mem::AlignedBytes;
use crate::shape::FloatLines;
use std::sync::atomic::Ordering;

/// Columns that rows are padded to: the widest panel.
const MAX_COLUMNS: usize = 32;

/// An operand in panels.
#[derive(Debug, Default)]
pub(crate) struct StripOperand {
    layout: Option<PanelLayout>,
    panels: Panels,
}

impl StripOperand {
    /// Whether a block is a NaN block, or has an exponent outside the fast range.
    pub(crate) fn is_general(&self) -> bool {
        self.panels.general.iter().any(|flag| flag.load(Ordering::Relaxed) != 0)
    }
    pub(crate) fn bytes(&self) -> usize {
        self.panels.bytes.capacity() + self.panels.general.capacity()
    }
}

/// A matrix of f32 whose rows have room for whole tiles. Its contents are unspecified until they are written.
#[derive(Debug, Default)]
pub(crate) struct PaddedRows {
    memory: AlignedBytes,
    rows: usize,
    stride: usize,
}

impl PaddedRows {
    pub(crate) fn reserve(&mut self, rows: usize, columns: usize) {
        let stride = columns.next_multiple_of(MAX_COLUMNS);
        // Rows at a distance of whole pages would push each other out of the first-level cache.
        let stride = if stride.is_multiple_of(512) { stride + 16 } else { stride };
        let rows = rows.next_multiple_of(PANEL_ROWS);
        self.memory.reserve(4 * rows * stride);
        (self.rows, self.stride) = (rows, stride);
    }

    fn pointer(&mut self) -> *mut f32 {
        self.memory.reserve(4 * self.rows * self.stride).as_ptr().cast()
    }

    pub(crate) fn fill(&mut self, value: f32) {
        let len = self.rows * self.stride;
        // SAFETY: reserved.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(), len) }.fill(value);
    }

    /// Row `i`, padding included.
    pub(crate) fn row(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows);
        let (p, stride) = (self.pointer(), self.stride);
        // SAFETY: inside what was reserved; every bit pattern is an f32, and the memory was initialised when allocated.
        unsafe { std::slice::from_raw_parts_mut(p.add(i * stride), stride) }
    }

    /// The first rows and columns as lines to encode: rows (`by_line`) or columns. They are rows `first_row` … of the
    /// tensor that random bits belong to.
    pub(crate) fn lines(&self, [rows, columns]: [usize; 2], by_line: bool, first_row: usize) -> FloatLines<'_> {
        assert!(rows <= self.rows && columns <= self.stride);
        // SAFETY: inside what was reserved, and borrowed as long as the lines live.
        unsafe { FloatLines::of_rows(self.memory.as_ptr().cast(), [rows, columns], self.stride, by_line, first_row) }
    }

    /// Writes the first `columns` of the first rows to `out`, row-major; NaNs become the canonical one.
    pub(crate) fn finish(&mut self, columns: usize, out: &mut [f32]) {
        for (i, out) in out.chunks_exact_mut(columns).enumerate() {
            for (out, &x) in out.iter_mut().zip(&self.row(i)[..columns]) {
                *out = general::finish(x, None);
            }
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.memory.capacity()
    }
}

/// Format and rounding of an operand.
#[derive(Clone, Copy, Debug)]
pub struct Coding {
    /// Blocks in lines, of at most 8 bits.
    pub format: BlockFormat,
    /// Rounding, and where its random bits come from.
    pub mode: RoundingMode,
}

/// How the two operands of a product are encoded, and the kernel for them.
#[derive(Clone, Copy)]
pub(crate) struct Pair {
    pub(crate) kernels: &'static Kernels,
    codings: [Coding; 2],
    /// Elements of a block.
    pub(crate) block: usize,
    correction: Correction,
    run: Option<TileFn>,
}

impl Pair {
    /// For a reduction of `k` elements.
    ///
    /// # Errors
    /// [`Error::Format`] for formats that do not go by panels, [`Error::Shape`] for blocks that do not fit each other.
    pub(crate) fn new(kernels: &'static Kernels, codings: [Coding; 2], k: usize) -> Result<Self> {
        let formats = codings.map(|coding| coding.format);
        for format in formats {
            if !format.encodes_to_panels() {
                let expected = "blocks in lines, of 8 bits or fewer, whose exponents are not cut short";
                return Err(Error::format(expected, format.to_string()));
            }
        }
        let [left, right] = formats;
        let block = left.block_along(k);
        if block != right.block_along(k) {
            let expected = format!("equal block boundaries along the reduction of {k}: {left} has blocks of {block}");
            return Err(Error::shape(expected, format!("{right} with blocks of {}", right.block_along(k))));
        }
        let steps = block.div_ceil(4);
        let tile = fitting(kernels.tiles, block, left, right);
        let correction = tile.map_or(Correction::Total, |tile| tile.correction);
        let shape = TileShape { steps, rows: PANEL_ROWS, lines: false, narrow: false };
        Ok(Self { kernels, codings, block, correction, run: tile.map(|tile| (tile.of_shape)(shape)) })
    }

    /// Bound of |Σ q_a q_w| over `k` elements, from the largest codes.
    pub(crate) fn largest_sum(&self, k: usize) -> usize {
        self.codings.iter().fold(k, |product, coding| product.saturating_mul(coding.format.max_code() as usize))
    }

    /// Lays out one matrix as the left operand.
    pub(crate) fn lay_out_left(&self, x: FloatLines<'_>, to: &mut StripOperand, scratch: &mut Scratch) {
        let offset = offset(self.codings[1].format.bits());
        self.lay_out(x, 0, Side::Left { correction: self.correction, offset }, to, scratch);
    }

    /// Lays out one matrix as the right operand.
    pub(crate) fn lay_out_right(&self, x: FloatLines<'_>, to: &mut StripOperand, scratch: &mut Scratch) {
        let offset = offset(self.codings[1].format.bits());
        self.lay_out(x, 1, Side::Right { offset }, to, scratch);
    }

    fn lay_out(&self, x: FloatLines<'_>, i: usize, side: Side, to: &mut StripOperand, scratch: &mut Scratch) {
        debug_assert_eq!(x.matrices(), 1);
        let Coding { format, mode } = self.codings[i];
        let source = Source::Floats(&x, mode);
        let width = if i == 0 { PANEL_ROWS } else { self.kernels.columns };
        let layout = PanelLayout::new(source.shape(), self.block, width, side);
        let ctx = Context { kernels: self.kernels, team: &crate::parallel::Serial, threads: 1 };
        let panels = to.panels.reserve(&layout);
        Filling::new(&ctx, Job { source: &source, format, layout, panels })
            .run_all(&ctx, scratch)
            .expect("floats can always be encoded");
        to.layout = Some(layout);
    }

    /// `c` [lines of `a`, `columns`] ← `start` + `a` · `b`ᵀ over all blocks of `a`, of which `b` has as many or more;
    /// `start` is +0.0 (`fresh`) or what `c` holds. NaNs need not be canonical.
    pub(crate) fn multiply(&self, a: &StripOperand, b: &StripOperand, columns: usize, c: &mut PaddedRows, fresh: bool) {
        let (al, bl) = (a.layout.expect("laid out"), b.layout.expect("laid out"));
        let panels = columns.div_ceil(bl.width);
        assert!(al.block == bl.block && al.blocks <= bl.blocks && panels <= bl.panels);
        assert!(al.panels * PANEL_ROWS <= c.rows && panels * bl.width <= c.stride);
        let (base, stride) = (c.pointer(), c.stride);
        let l1 = Caches::get().l1 / 2;
        let depth = (l1 / bl.block_bytes).clamp(1, al.blocks);
        let tile = |i: usize, j: usize, from: usize| {
            let blocks = depth.min(al.blocks - from);
            let (ap, bp) = (al.panel(0, i), bl.panel(0, j));
            // SAFETY: block `from` of a panel that was laid out.
            let (a_bytes, b_bytes) = unsafe {
                (
                    a.panels.bytes.as_ptr().add(ap * al.panel_bytes() + from * al.block_bytes),
                    b.panels.bytes.as_ptr().add(bp * bl.panel_bytes() + from * bl.block_bytes),
                )
            };
            let at = base.wrapping_add(i * PANEL_ROWS * stride + j * bl.width);
            let tile = Tile { c: at, stride, fresh: fresh && from == 0, around: false };
            let [general_a, general_b] =
                [(a, ap), (b, bp)].map(|(operand, panel)| operand.panels.general[panel].load(Ordering::Relaxed) != 0);
            let general = general_a | general_b;
            match self.run.filter(|_| !general) {
                // SAFETY: the panels have these layouts; four rows of a panel's columns lie inside `c`.
                Some(run) => unsafe {
                    run(Operands { pieces: 1, a: &raw const a_bytes, blocks, steps: al.steps, b: b_bytes }, tile);
                },
                // SAFETY: the same.
                None => unsafe { general_tile(&al, &bl, a_bytes, b_bytes, blocks, tile) },
            }
        };
        for from in (0..al.blocks).step_by(depth) {
            // The smaller operand stays in the first-level cache.
            if panels * depth * bl.block_bytes <= l1 {
                (0..al.panels).for_each(|i| (0..panels).for_each(|j| tile(i, j, from)));
            } else {
                (0..panels).for_each(|j| (0..al.panels).for_each(|i| tile(i, j, from)));
            }
        }
    }
}

/// A tile by the general path.
///
/// # Safety
/// `a` and `b` are valid for reading `blocks` blocks of their layouts, the tile for reading and writing four rows.
#[cold]
unsafe fn general_tile(al: &PanelLayout, bl: &PanelLayout, a: *const u8, b: *const u8, blocks: usize, tile: Tile) {
    let mut buffer = [0.0; PANEL_ROWS * MAX_COLUMNS];
    let buffer = &mut buffer[..PANEL_ROWS * bl.width];
    // SAFETY: the caller vouches for all of it; rows do not overlap.
    unsafe {
        let row = |i: usize| std::slice::from_raw_parts_mut(tile.c.add(i * tile.stride), bl.width);
        if !tile.fresh {
            buffer.chunks_exact_mut(bl.width).enumerate().for_each(|(i, to)| to.copy_from_slice(row(i)));
        }
        let a = std::slice::from_raw_parts(a, blocks * al.block_bytes);
        let b = std::slice::from_raw_parts(b, blocks * bl.block_bytes);
        general::tile(al, bl, a, b, buffer);
        buffer.chunks_exact(bl.width).enumerate().for_each(|(i, from)| row(i).copy_from_slice(from));
    }
}
