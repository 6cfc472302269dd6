//! Operands in the kernels' layout: panels of 4 rows (left) or two registers of columns (right). `crate::arch::generic::product`
//! draws the bytes; `super::filling` writes them.
#![allow(unsafe_code, reason = "memory that tasks write disjoint panels of")]

use crate::arch::generic::encode::STRIP;
use crate::arch::generic::product::{Correction, PANEL_ROWS, a_block_bytes, b_block_bytes, nibble_block_bytes};
use crate::mem::{AlignedBytes, SharedMut};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

/// Which operand, and what the other one makes it carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Rows of C. `offset` is what the right operand's codes were raised by.
    Left { correction: Correction, offset: i32 },
    /// Columns of C, raised by `offset`.
    Right { offset: i32 },
}

/// How the codes of a block lie in its panel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// As the kernels read them.
    Bytes,
    /// Right operands of 4 bits or fewer that are kept: two codes a byte.
    Nibbles,
    /// Left operands line by line, so that any four lines can be made a panel: codes, correction and rider of each block.
    Lines,
    /// Left operands that are kept: codes, two a byte at up to 4 bits, and exponent bytes.
    Compact {
        /// Whether two codes share a byte.
        nibbles: bool,
    },
}

/// Sizes of the panels of one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PanelLayout {
    pub(crate) matrices: usize,
    pub(crate) lines: usize,
    pub(crate) k: usize,
    pub(crate) block: usize,
    /// Lines of a panel.
    pub(crate) width: usize,
    /// Four-element steps of a block.
    pub(crate) steps: usize,
    pub(crate) blocks: usize,
    /// Panels of a matrix.
    pub(crate) panels: usize,
    pub(crate) block_bytes: usize,
    pub(crate) side: Side,
    pub(crate) form: Form,
    /// One matrix stands for all.
    pub(crate) shared: bool,
    /// The matrices are consecutive pieces of the reduction of one matrix.
    pub(crate) pieces: bool,
    /// So are the lines of the one matrix, this many panels each; 0: they are not.
    pub(crate) lined_up: usize,
}

impl PanelLayout {
    /// Panels of `width` lines.
    pub(crate) fn new([matrices, lines, k]: [usize; 3], block: usize, width: usize, side: Side) -> Self {
        let steps = block.div_ceil(4);
        let (blocks, panels) = (k.div_ceil(block), lines.div_ceil(width));
        let block_bytes = plain_block_bytes(side, steps, width);
        let (form, shared, pieces, lined_up) = (Form::Bytes, false, false, 0);
        Self {
            matrices,
            lines,
            k,
            block,
            width,
            steps,
            blocks,
            panels,
            block_bytes,
            side,
            form,
            shared,
            pieces,
            lined_up,
        }
    }
    /// The same, each matrix a piece of the reduction of one.
    pub(crate) fn in_pieces(self) -> Self {
        Self { pieces: true, ..self }
    }
    /// The same, each run of `lines` lines of the one matrix a piece: they fill panels, and all of them fill strips.
    pub(crate) fn lined_up(self, lines: usize) -> Self {
        debug_assert!(self.matrices == 1 && lines.is_multiple_of(self.width) && self.lines.is_multiple_of(STRIP));
        Self { lined_up: lines / self.width, ..self }
    }
    /// Pieces as what they are pieces of.
    pub(crate) fn joined(self) -> Self {
        let blocks = self.piece_count() * self.blocks;
        let panels = if self.lined_up > 0 { self.lined_up } else { self.panels };
        let lines = if self.lined_up > 0 { panels * self.width } else { self.lines };
        Self { matrices: 1, lines, panels, blocks, k: blocks * self.block, pieces: false, lined_up: 0, ..self }
    }
    /// Pieces of the reduction.
    pub(crate) fn piece_count(&self) -> usize {
        match (self.lined_up, self.pieces) {
            (0, false) => 1,
            (0, true) => self.matrices,
            (panels, _) => self.panels / panels,
        }
    }
    /// The same lines of a left operand one by one.
    pub(crate) fn in_lines(self) -> Self {
        Self { form: Form::Lines, ..self }
    }
    /// The same panels of a left operand of `bits` bits, to be kept.
    pub(crate) fn compact(self, bits: u8) -> Self {
        let nibbles = bits <= 4 && self.step() == 4;
        let rows = if nibbles { self.steps.div_ceil(2) } else { self.steps };
        Self { block_bytes: 4 * PANEL_ROWS * rows + PANEL_ROWS, form: Form::Compact { nibbles }, ..self }
    }
    /// The same panels with two codes a byte.
    pub(crate) fn in_nibbles(self) -> Self {
        Self { block_bytes: nibble_block_bytes(self.steps, self.width), form: Form::Nibbles, ..self }
    }
    pub(crate) fn panel_bytes(&self) -> usize {
        self.blocks * self.block_bytes * self.piece_count()
    }
    /// Number of a matrix's panel among all. Matrices begin with whole strips, so that strips are written whole.
    pub(crate) fn panel(&self, matrix: usize, panel: usize) -> usize {
        match (self.lined_up, self.pieces) {
            (0, false) => matrix * self.strips() * (STRIP / self.width) + panel,
            (0, true) => panel,
            (panels, _) => panel % panels,
        }
    }
    /// Where the blocks of a matrix's panel begin.
    pub(crate) fn panel_at(&self, matrix: usize, panel: usize) -> usize {
        let piece = match (self.lined_up, self.pieces) {
            (0, false) => 0,
            (0, true) => matrix,
            (panels, _) => panel / panels,
        };
        self.panel(matrix, panel) * self.panel_bytes() + piece * self.blocks * self.block_bytes
    }
    /// Panels of all matrices.
    pub(crate) fn panel_count(&self) -> usize {
        match (self.lined_up, self.pieces) {
            (0, false) => self.matrices * self.strips() * (STRIP / self.width),
            (0, true) => self.strips() * (STRIP / self.width),
            (panels, _) => panels,
        }
    }
    /// Bytes of a line's step.
    pub(crate) fn step(&self) -> usize {
        match self.side {
            Side::Left { .. } => (self.plain_block_bytes() - 32) / (PANEL_ROWS * self.steps),
            Side::Right { .. } => 4,
        }
    }
    /// Bytes of a block as the kernels read it.
    pub(crate) fn plain_block_bytes(&self) -> usize {
        plain_block_bytes(self.side, self.steps, self.width)
    }
    pub(crate) fn bytes(&self) -> usize {
        self.panel_count() * self.panel_bytes()
    }
    pub(crate) fn strips(&self) -> usize {
        self.lines.div_ceil(STRIP)
    }
    /// What right operands' codes are raised by.
    pub(crate) fn offset(&self) -> i32 {
        let (Side::Left { offset, .. } | Side::Right { offset }) = self.side;
        offset
    }
    pub(crate) fn correction(&self) -> Option<Correction> {
        match self.side {
            Side::Left { correction, .. } => Some(correction),
            Side::Right { .. } => None,
        }
    }
}

fn plain_block_bytes(side: Side, steps: usize, width: usize) -> usize {
    match side {
        Side::Left { correction, .. } => a_block_bytes(steps, correction == Correction::Wide),
        Side::Right { .. } => b_block_bytes(steps, width),
    }
}

/// An operand in panels.
#[derive(Debug, Default)]
pub(crate) struct Panels {
    pub(crate) bytes: AlignedBytes,
    /// Per panel: 1 if a block is a NaN block or its exponent lies outside the fast range.
    pub(crate) general: Vec<AtomicU8>,
    /// Whether any flag is set.
    any_general: AtomicBool,
}

impl Panels {
    pub(crate) fn as_ref(&self) -> PanelsRef {
        PanelsRef { bytes: self.bytes.as_ptr(), general: self.general.as_ptr() }
    }

    /// Memory for panels of this layout.
    pub(crate) fn reserve(&mut self, layout: &PanelLayout) -> PanelsMut<'_> {
        self.reserve_bytes(layout.bytes(), layout.panel_count())
    }

    /// So many bytes, and flags.
    pub(crate) fn reserve_bytes(&mut self, len: usize, flags: usize) -> PanelsMut<'_> {
        let bytes = self.bytes.reserve(len);
        self.general.clear();
        self.general.resize_with(flags, AtomicU8::default);
        // SAFETY: reserved just now; `self` stays borrowed as long as this lives.
        let bytes = unsafe { SharedMut::from_raw(bytes.as_ptr(), len) };
        *self.any_general.get_mut() = false;
        PanelsMut { bytes, general: &self.general, any_general: Some(&self.any_general), fresh: false }
    }
}

/// Memory that panels are written to, by several tasks at once.
#[derive(Clone, Copy)]
pub(crate) struct PanelsMut<'a> {
    pub(crate) bytes: SharedMut<'a, u8>,
    /// Zero before the first write.
    pub(crate) general: &'a [AtomicU8],
    /// Whether any flag is set; None in memory of the caller's.
    pub(crate) any_general: Option<&'a AtomicBool>,
    /// Whether the memory may never have been written to before.
    pub(crate) fresh: bool,
}

impl<'a> PanelsMut<'a> {
    /// Memory of the caller's, for as many panels as `general` has bytes.
    pub(crate) fn new(bytes: &'a mut [u8], general: &'a mut [u8]) -> Self {
        general.fill(0);
        // SAFETY: an atomic byte is laid out as a byte, and nobody else uses these as long as they are borrowed.
        let general = unsafe { std::slice::from_raw_parts(general.as_mut_ptr().cast::<AtomicU8>(), general.len()) };
        Self { bytes: SharedMut::new(bytes), general, any_general: None, fresh: false }
    }
    /// The panels, to be read once they are written.
    pub(crate) fn as_ref(&self) -> PanelsRef {
        PanelsRef { bytes: self.bytes.as_ptr(), general: self.general.as_ptr() }
    }
    pub(crate) fn set_general(&self, panel: usize) {
        self.general[panel].store(1, Ordering::Relaxed);
        if let Some(any) = self.any_general {
            any.store(true, Ordering::Relaxed);
        }
    }
}

/// Panels that another stage of tasks writes, or has written.
#[derive(Clone, Copy)]
pub(crate) struct PanelsRef {
    pub(crate) bytes: *const u8,
    general: *const AtomicU8,
}
// SAFETY: whoever reads through the pointers vouches for the order.
unsafe impl Send for PanelsRef {}
// SAFETY: as above.
unsafe impl Sync for PanelsRef {}

impl PanelsRef {
    /// Panels and their flags that lie in two slices.
    pub(crate) fn new((bytes, general): (&[u8], &[u8])) -> Self {
        // An atomic byte is laid out as a byte; it is only read here.
        Self { bytes: bytes.as_ptr(), general: general.as_ptr().cast() }
    }
    /// Whether a panel needs the general product.
    ///
    /// # Safety
    /// There is such a panel.
    pub(crate) unsafe fn is_general(&self, panel: usize) -> bool {
        // SAFETY: one flag a panel.
        unsafe { (*self.general.add(panel)).load(Ordering::Relaxed) != 0 }
    }
}
