//! Products on the calling thread, strip by strip, for matrices that are never held whole: operands in panels whose
//! memory serves the next strip again, C in rows padded to whole panels, so that every tile is written in place. Right
//! operands may also grow, line by line or block by block, and are then kept as tightly as codes can be.
#![allow(unsafe_code, reason = "calls of kernels on padded buffers")]

use super::cache::Caches;
use super::{fitting, general, offset};
use crate::arch::generic::product::{Correction, Operands, PANEL_ROWS, RIDER, Tile};
use crate::arch::kernels::{Kernels, TileKernel, TileShape};
use crate::encode::blocks::Scratch;
use crate::encode::filling::{Filling, Job, Source};
use crate::encode::forms::to_nibbles;
use crate::encode::panels::{Form, PanelLayout, Panels, Side};
use crate::encode::{Context, RoundingMode};
use crate::error::{Error, Result};
use crate::format::{BlockFormat, EXPONENT_OFFSET};
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

/// A right operand to which lines or blocks are added: blocks of panels one after the other, in the order that its owner
/// numbers them by, two codes a byte where they have 4 bits or fewer.
#[derive(Clone, Debug, Default)]
pub(crate) struct GrownOperand {
    bytes: Vec<u8>,
    /// Whether a block is a NaN block, or has an exponent outside the fast range; or was, before it was forgotten.
    general: bool,
}

impl GrownOperand {
    /// Keeps the first `parts` of `of` equal parts.
    pub(crate) fn truncate(&mut self, parts: usize, of: usize) {
        self.bytes.truncate(self.bytes.len() / of.max(1) * parts);
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.len()
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
    tile: Option<&'static TileKernel>,
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
        let tile = fitting(kernels.tiles, block, left, right);
        let correction = tile.map_or(Correction::Total, |tile| tile.correction);
        Ok(Self { kernels, codings, block, correction, tile })
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

    /// Layout of a block of a grown operand's panels, in bytes and as it is kept.
    fn grown_layouts(&self, lines: usize, k: usize) -> [PanelLayout; 2] {
        let (format, width) = (self.codings[1].format, self.kernels.columns);
        let plain = PanelLayout::new([1, lines, k], self.block, width, Side::Right { offset: offset(format.bits()) });
        [plain, if format.bits() <= 4 { plain.in_nibbles() } else { plain }]
    }

    /// Adds blocks to all lines of a grown operand: first all panels of their first block.
    pub(crate) fn grow_blocks(
        &self,
        x: FloatLines<'_>,
        to: &mut GrownOperand,
        new: &mut StripOperand,
        scratch: &mut Scratch,
    ) {
        self.lay_out_right(x, new, scratch);
        let layout = new.layout.expect("laid out");
        let [plain, kept] = self.grown_layouts(layout.lines, layout.k);
        to.general |= new.is_general();
        for (b, panel) in (0..plain.blocks).flat_map(|b| (0..plain.panels).map(move |panel| (b, panel))) {
            let at = plain.panel(0, panel) * plain.panel_bytes() + b * plain.block_bytes;
            // SAFETY: a block of a panel that was laid out.
            let from = unsafe { std::slice::from_raw_parts(new.panels.bytes.as_ptr().add(at), plain.block_bytes) };
            if kept.form == Form::Nibbles {
                let at = to.bytes.len();
                to.bytes.resize(at + kept.block_bytes, 0);
                to_nibbles(from, &plain, &mut to.bytes[at..]);
            } else {
                to.bytes.extend_from_slice(from);
            }
        }
    }

    /// Adds lines to a grown operand that has `line` of them: first all blocks of its first panel.
    pub(crate) fn grow_lines(
        &self,
        x: FloatLines<'_>,
        to: &mut GrownOperand,
        line: usize,
        new: &mut StripOperand,
        scratch: &mut Scratch,
    ) {
        // As a left operand, whose panels are narrow: mostly there is but one line.
        let offset = offset(self.codings[1].format.bits());
        self.lay_out(x, 1, Side::Left { correction: Correction::Total, offset }, new, scratch);
        let from = new.layout.expect("laid out");
        let [_, kept] = self.grown_layouts(from.lines, from.k);
        let PanelLayout { width, steps, blocks, block_bytes, .. } = kept;
        to.general |= new.is_general();
        to.bytes.resize((line + from.lines).div_ceil(width) * blocks * block_bytes, 0);
        for (lane, b) in (0..from.lines).flat_map(|lane| (0..blocks).map(move |b| (lane, b))) {
            let at = from.panel(0, lane / PANEL_ROWS) * from.panel_bytes() + b * from.block_bytes;
            // SAFETY: a block of a panel that was laid out.
            let block = unsafe { std::slice::from_raw_parts(new.panels.bytes.as_ptr().add(at), from.block_bytes) };
            let (words, _) = block.as_chunks::<4>();
            let word = |at: usize| u32::from_le_bytes(words[PANEL_ROWS * at + lane % PANEL_ROWS]);
            // Four codes raised by the offset, none of which carries into the next.
            let raised = |step: usize| {
                let codes = word(step);
                ((codes & 0x7F7F_7F7F) + 0x0101_0101 * offset as u32) ^ (codes & 0x8080_8080)
            };
            let rider = word(steps + 1);
            let to_line = line + lane;
            let into = &mut to.bytes[(to_line / width * blocks + b) * block_bytes..][..block_bytes];
            let at = to_line % width;
            if kept.form == Form::Nibbles {
                let rows = steps.div_ceil(2);
                for row in 0..rows {
                    let odd = if 2 * row + 1 < steps { raised(2 * row + 1) } else { 0 };
                    let both = raised(2 * row) | odd << 4;
                    into[4 * (row * width + at)..][..4].copy_from_slice(&both.to_le_bytes());
                }
                into[4 * rows * width + at] = ((rider.cast_signed() >> 23) + EXPONENT_OFFSET) as u8;
            } else {
                for step in 0..steps {
                    into[4 * (step * width + at)..][..4].copy_from_slice(&raised(step).to_le_bytes());
                }
                let rider = RIDER.wrapping_add(rider.cast_signed());
                into[4 * (steps * width + at)..][..4].copy_from_slice(&rider.to_le_bytes());
            }
        }
    }

    fn lay_out(&self, x: FloatLines<'_>, i: usize, side: Side, to: &mut StripOperand, scratch: &mut Scratch) {
        debug_assert_eq!(x.matrices(), 1);
        let Coding { format, mode } = self.codings[i];
        let source = Source::Floats(&x, mode);
        let width = if matches!(side, Side::Left { .. }) { PANEL_ROWS } else { self.kernels.columns };
        let layout = PanelLayout::new(source.shape(), self.block, width, side);
        let ctx = Context { kernels: self.kernels, team: &crate::parallel::Serial, threads: 1 };
        let panels = to.panels.reserve(&layout);
        Filling::new(&ctx, Job::new(&source, format, layout, panels))
            .run_all(&ctx, scratch)
            .expect("floats can always be encoded");
        to.layout = Some(layout);
    }

    /// `c` [lines of `a`, `columns`] ← `start` + `a` · `b`ᵀ over all blocks of `a`, of which `b` has as many or more;
    /// `start` is +0.0 (`fresh`) or what `c` holds. NaNs need not be canonical.
    pub(crate) fn multiply(&self, a: &StripOperand, b: &StripOperand, columns: usize, c: &mut PaddedRows, fresh: bool) {
        self.multiply_from(0, a, b, columns, c, fresh);
    }

    /// The same over the blocks of `a` from block `first` on: to them belong those of `b` from its first on.
    pub(crate) fn multiply_from(
        &self,
        first: usize,
        a: &StripOperand,
        b: &StripOperand,
        columns: usize,
        c: &mut PaddedRows,
        fresh: bool,
    ) {
        let (al, bl) = (a.layout.expect("laid out"), b.layout.expect("laid out"));
        let (panels, all) = (columns.div_ceil(bl.width), al.blocks - first);
        assert!(al.block == bl.block && all <= bl.blocks && panels <= bl.panels);
        assert!(al.panels * PANEL_ROWS <= c.rows && panels * bl.width <= c.stride);
        let (base, stride) = (c.pointer(), c.stride);
        let l1 = Caches::get().l1 / 2;
        let depth = (l1 / bl.block_bytes).clamp(1, all.max(1));
        let tile = |i: usize, j: usize, from: usize| {
            let blocks = depth.min(all - from);
            let right = bl.panel(0, j);
            // SAFETY: block `from` of a panel that was laid out.
            let b_bytes = unsafe { b.panels.bytes.as_ptr().add(right * bl.panel_bytes() + from * bl.block_bytes) };
            let at = base.wrapping_add(i * PANEL_ROWS * stride + j * bl.width);
            let tile = Tile { c: at, stride, fresh: fresh && from == 0, around: false };
            let general = b.panels.general[right].load(Ordering::Relaxed) != 0;
            // SAFETY: the panels have these layouts; four rows of a panel's columns lie inside `c`.
            unsafe { self.tile(a, (i, first + from), (&bl, b_bytes), blocks, general, tile) };
        };
        for from in (0..all).step_by(depth) {
            // The smaller operand stays in the first-level cache.
            if panels * depth * bl.block_bytes <= l1 {
                (0..al.panels).for_each(|i| (0..panels).for_each(|j| tile(i, j, from)));
            } else {
                (0..panels).for_each(|j| (0..al.panels).for_each(|i| tile(i, j, from)));
            }
        }
    }

    /// The same over `blocks` blocks of `a` from block `from` on, and as many of `b`: block i of panel j is number
    /// `number(j, i)` there. `unpacked` is memory to work in.
    pub(crate) fn multiply_grown(
        &self,
        (a, from, blocks): (&StripOperand, usize, usize),
        (b, number): (&GrownOperand, impl Fn(usize, usize) -> usize),
        columns: usize,
        (c, fresh): (&mut PaddedRows, bool),
        unpacked: &mut AlignedBytes,
    ) {
        let al = a.layout.expect("laid out");
        let [plain, kept] = self.grown_layouts(columns, blocks * self.block);
        let width = plain.width;
        assert!(al.block == self.block && from + blocks <= al.blocks);
        assert!(al.panels * PANEL_ROWS <= c.rows && plain.panels * width <= c.stride);
        let (base, stride) = (c.pointer(), c.stride);
        let unpacked = unpacked.reserve(plain.block_bytes).as_ptr();
        for (j, i) in (0..plain.panels).flat_map(|j| (0..blocks).map(move |i| (j, i))) {
            let mut block = b.bytes[number(j, i) * kept.block_bytes..][..kept.block_bytes].as_ptr();
            if kept.form == Form::Nibbles {
                // SAFETY: a block of nibbles, and room for one of bytes.
                unsafe { (self.kernels.unpack_nibbles)(1, plain.steps, block, unpacked) };
                block = unpacked;
            }
            for row in 0..al.panels {
                let at = base.wrapping_add(row * PANEL_ROWS * stride + j * width);
                let tile = Tile { c: at, stride, fresh: fresh && i == 0, around: false };
                // SAFETY: the panels have these layouts; four rows of a panel's columns lie inside `c`.
                unsafe { self.tile(a, (row, from + i), (&plain, block), 1, b.general, tile) };
            }
        }
    }

    /// C tile ← what it starts from + `blocks` blocks of panel `panel` of `a` from block `from` on, times as many of `b`.
    ///
    /// # Safety
    /// `b` is valid for reading `blocks` blocks of its layout, in bytes, which is general only if `general`; the tile for
    /// reading and writing four rows.
    #[inline]
    unsafe fn tile(
        &self,
        a: &StripOperand,
        (panel, from): (usize, usize),
        (bl, b): (&PanelLayout, *const u8),
        blocks: usize,
        general: bool,
        tile: Tile,
    ) {
        let al = a.layout.as_ref().expect("laid out");
        let left = al.panel(0, panel);
        let at = left * al.panel_bytes() + from * al.block_bytes;
        assert!(from + blocks <= al.blocks);
        // SAFETY: block `from` of a panel that was laid out.
        let a_bytes = unsafe { a.panels.bytes.as_ptr().add(at) };
        let general = general || a.panels.general[left].load(Ordering::Relaxed) != 0;
        match self.tile.filter(|_| !general) {
            Some(kernel) => {
                let rows = PANEL_ROWS.min(al.lines - panel * PANEL_ROWS);
                let run = (kernel.of_shape)(TileShape { steps: al.steps, rows, lines: false, narrow: false });
                // SAFETY: the caller's word.
                unsafe { run(Operands { pieces: 1, a: &raw const a_bytes, blocks, steps: al.steps, b }, tile) };
            }
            // SAFETY: the same.
            None => unsafe { general_tile(al, bl, a_bytes, b, blocks, tile) },
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
