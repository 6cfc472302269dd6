//! Tiles of C over the panels of a task: each by the kernel that fits it.
#![allow(unsafe_code, reason = "calls of kernels, and tasks that write disjoint tiles")]

use super::{Epilogue, general};
use crate::arch::generic::matrix_unit;
use crate::arch::generic::product::{Operands, PANEL_ROWS, Tile, b_block_bytes};
use crate::arch::kernels::{MatrixUnitKernels, TileFn, TileKernel, TileShape, UnitTileFn};
use crate::encode::blocks::TileBuffers;
use crate::encode::panels::{Form, PanelLayout};
use crate::encode::{Context, forms};
use crate::mem::{AlignedBytes, SharedMut};
use std::ops::Range;

/// The kernel of a product; without one, every tile takes the general path.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub(super) tile: Option<&'static TileKernel>,
    pub(super) from_nibbles: bool,
}

/// Widest B panel.
const MAX_COLUMNS: usize = 32;

/// A tile on its own.
#[repr(align(64))]
struct Buffer([f32; PANEL_ROWS * MAX_COLUMNS]);

impl Default for Buffer {
    fn default() -> Self {
        Self([0.0; PANEL_ROWS * MAX_COLUMNS])
    }
}

/// Bytes of C from which on it goes around the caches.
const AROUND_CACHES: usize = 8 << 20;

/// Some blocks of a B panel.
#[derive(Clone, Copy)]
pub(super) struct PanelBlocks {
    pub(super) bytes: *const u8,
    pub(super) general: bool,
}

/// Where some blocks of four rows of A lie.
#[derive(Clone, Copy)]
pub(super) enum Left<'a> {
    /// In a panel.
    Panel(*const u8),
    /// Piece by piece of the reduction: in a panel each, or in four lines where the layout is one of lines.
    Pieces(&'a [*const u8]),
}

impl Left<'_> {
    fn starts(&self) -> &[*const u8] {
        match self {
            Self::Panel(start) => std::slice::from_ref(start),
            Self::Pieces(starts) => starts,
        }
    }
}

/// Some blocks of four rows of A.
#[derive(Clone, Copy)]
pub(super) struct LeftBlocks<'a> {
    pub(super) rows: Left<'a>,
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
    /// Whether these are its last blocks.
    pub(super) last: bool,
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
    /// The fewest rows that these write.
    fewest_rows: usize,
    from_nibbles: bool,
    /// For tiles of 32 × 32.
    unit: Option<Unit>,
    /// Whether C would push all else out of the caches.
    large: bool,
}

/// A matrix unit, and its kernel for the blocks at hand.
#[derive(Clone, Copy)]
struct Unit {
    kernels: &'static MatrixUnitKernels,
    run: UnitTileFn,
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
        let lines = al.form == Form::Lines;
        let narrow = bl.width < ctx.kernels.columns;
        debug_assert!(!(narrow && bl.form == Form::Nibbles), "nibbles are unpacked two registers at a time");
        let fewest_rows = if lines || narrow { PANEL_ROWS } else { 1 };
        let shape = |rows: usize| TileShape { steps: al.steps, rows: rows.max(fewest_rows), lines, narrow };
        let run = kernel.tile.map(|tile| [1, 2, 3, 4].map(|rows| (tile.of_shape)(shape(rows))));
        let large = size_of::<f32>() * out.len() >= AROUND_CACHES;
        let fits = run.is_some() && matrix_unit::fits(al.steps) && bl.width == matrix_unit::SIDE;
        let unit = ctx.kernels.matrix_unit.as_ref().filter(|_| fits);
        let unit = unit.map(|kernels| Unit { kernels, run: (kernels.tile)(al.steps) });
        let from_nibbles = kernel.from_nibbles;
        Self { ctx, al, bl, out, epilogue, run, fewest_rows, from_nibbles, unit, large }
    }

    /// Whether a matrix unit takes what tiles of 32 × 32 a task has.
    pub(super) fn on_unit(&self) -> bool {
        self.unit.is_some()
    }

    /// Whether a tile, some of whose blocks needed the general product, or none, has last steps.
    pub(super) fn finishes(&self, general: bool) -> bool {
        general || self.epilogue.accumulate || self.epilogue.bias.is_some()
    }

    /// `blocks` blocks of a B panel, unpacked into `buffer` unless the kernel takes them as they are.
    fn right_panel(&self, panel: PanelBlocks, blocks: usize, buffer: &mut AlignedBytes) -> PanelBlocks {
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
    unsafe fn tile(&self, a: LeftBlocks<'_>, b: PanelBlocks, blocks: usize, place: Place, buffer: &mut Buffer) {
        let columns = self.bl.width;
        let Place { at, stride, height, width, column, first, finish, .. } = place;
        let c = self.out.pointer(at, (height - 1) * stride + width);
        // SAFETY: a tile belongs to one task, and each of its rows is taken once at a time.
        let row = |r: usize| unsafe { self.out.part(at + r * stride, width) };
        let fresh = first && !self.epilogue.accumulate;
        let general = a.general | b.general;
        let run = self.run.filter(|_| !general && blocks > 0).map(|run| run[height - 1]);
        let of = self.operands(&a.rows, b.bytes, blocks);
        // Every second access to a row off its register's alignment would touch two cache lines, block after block.
        let aligned = (c as usize | (4 * stride)).is_multiple_of(32);
        let in_place = width == columns && height >= self.fewest_rows && aligned;
        if let (Some(run), true) = (run, in_place) {
            // SAFETY: the caller's word; the kernel writes as many rows as there are.
            unsafe { run(of, Tile { c, stride, fresh, around: false }) };
        } else {
            let buffer = &mut buffer.0[..PANEL_ROWS * columns];
            for (r, to) in buffer.chunks_exact_mut(columns).take(height).enumerate() {
                if fresh { to.fill(0.0) } else { to[..width].copy_from_slice(row(r)) }
            }
            let tile = Tile { c: buffer.as_mut_ptr(), stride: columns, fresh: false, around: false };
            match run {
                // SAFETY: as above; the buffer has 4 rows.
                Some(run) => unsafe { run(of, tile) },
                None => self.general_tile(&a.rows, b.bytes, blocks, buffer),
            }
            for (r, from) in buffer.chunks_exact(columns).take(height).enumerate() {
                row(r).copy_from_slice(&from[..width]);
            }
        }
        if finish {
            let rows = (0..height).map(row);
            self.finish(rows, column);
        }
    }

    /// Pointers of a piece of A.
    fn pointers(&self) -> usize {
        if self.al.form == Form::Lines { PANEL_ROWS } else { 1 }
    }

    fn operands(&self, rows: &Left<'_>, b: *const u8, blocks: usize) -> Operands {
        let starts = rows.starts();
        let pieces = starts.len() / self.pointers();
        Operands { pieces, a: starts.as_ptr(), blocks: blocks / pieces.max(1), steps: self.al.steps, b }
    }

    /// The last steps of rows of a tile that begins at this column.
    fn finish<'r>(&self, rows: impl Iterator<Item = &'r mut [f32]>, column: usize) {
        for row in rows {
            let bias = self.epilogue.bias.map(|bias| &bias[column..][..row.len()]);
            for (c, x) in row.iter_mut().enumerate() {
                *x = general::finish(*x, bias.map(|bias| bias[c]));
            }
        }
    }

    #[cold]
    fn general_tile(&self, rows: &Left<'_>, b: *const u8, blocks: usize, tile: &mut [f32]) {
        if blocks == 0 {
            return;
        }
        let mut buffer = AlignedBytes::default();
        let b = if self.from_nibbles { self.unpack(b, blocks, &mut buffer) } else { b };
        let b_block = b_block_bytes(self.bl.steps, self.bl.width);
        let (block_bytes, starts) = (self.al.block_bytes, rows.starts());
        let each = blocks * self.pointers() / starts.len();
        let mut a = vec![0; blocks * block_bytes];
        for (piece, to) in starts.chunks_exact(self.pointers()).zip(a.chunks_exact_mut(each * block_bytes)) {
            for (block, to) in to.chunks_exact_mut(block_bytes).enumerate() {
                // SAFETY: the rows hold as many blocks of the layout.
                unsafe {
                    if let Ok(lines) = <[_; PANEL_ROWS]>::try_from(piece) {
                        let lines = lines.map(|line: *const u8| line.add(block * block_bytes / PANEL_ROWS));
                        forms::from_lines(lines, self.al.step(), to);
                    } else {
                        to.copy_from_slice(std::slice::from_raw_parts(piece[0].add(block * block_bytes), block_bytes));
                    }
                }
            }
        }
        // SAFETY: the panel was laid out with this layout.
        let b = unsafe { std::slice::from_raw_parts(b, blocks * b_block) };
        general::tile(&self.al, &self.bl, &a, b, tile);
    }
}

/// What a task multiplies: some panels of both operands, over some blocks.
pub(super) struct Task<L, R, P> {
    pub(super) blocks: usize,
    pub(super) rows: Range<usize>,
    pub(super) columns: Range<usize>,
    /// Four rows of A.
    pub(super) left: L,
    /// A panel of B, as it is stored.
    pub(super) right: R,
    /// Where the tile of two panels lies, and whether one of its blocks needs the general product.
    pub(super) place: P,
}

impl<'a, L, R, P> Task<L, R, P>
where
    L: Fn(usize) -> LeftBlocks<'a>,
    R: Fn(usize) -> PanelBlocks,
    P: Fn(usize, usize, bool) -> Place,
{
    /// C of the task.
    ///
    /// # Safety
    /// The panels hold as many blocks of the layouts, and stay as they are; the tiles belong to the task.
    pub(super) unsafe fn run(&self, tiles: &Tiles<'_>, buffers: &mut TileBuffers) {
        let groups = match tiles.unit {
            // One panel of B would not pay for laying out those of A.
            Some(_) if self.blocks > 0 && self.columns.len() > 1 => self.groups(tiles),
            _ => Vec::new(),
        };
        // SAFETY: the caller's word.
        unsafe {
            match tiles.unit.filter(|_| !groups.is_empty()) {
                Some(unit) => self.on_unit(unit, tiles, &groups, buffers),
                None => self.columns.clone().for_each(|j| self.column(tiles, j, &self.rows, &mut buffers.panel)),
            }
        }
    }

    /// The tiles of a B panel and some A panels.
    ///
    /// # Safety
    /// As for [`Task::run`].
    unsafe fn column(&self, tiles: &Tiles<'_>, j: usize, rows: &Range<usize>, panel: &mut AlignedBytes) {
        let mut buffer = Buffer::default();
        let b = tiles.right_panel((self.right)(j), self.blocks, panel);
        for i in rows.clone() {
            let a = (self.left)(i);
            let place = (self.place)(i, j, a.general | b.general);
            // SAFETY: the caller's word.
            unsafe { tiles.tile(a, b, self.blocks, place, &mut buffer) };
        }
    }

    /// The first of every eight A panels whose rows follow one another and that need no general product.
    fn groups(&self, tiles: &Tiles<'_>) -> Vec<usize> {
        let whole = |first: usize| {
            let last = first + matrix_unit::PANELS - 1;
            let place = |i: usize| (self.place)(i, self.columns.start, false);
            last < self.rows.end
                && (first..=last).all(|i| !(self.left)(i).general && place(i).height == PANEL_ROWS)
                && (first..last).all(|i| place(i + 1).at == place(i).at + PANEL_ROWS * place(i).stride)
        };
        debug_assert_eq!(tiles.al.width, PANEL_ROWS);
        self.rows.clone().step_by(matrix_unit::PANELS).filter(|&first| whole(first)).collect()
    }

    /// The panels from `first` on as a matrix unit reads them, piece by piece.
    ///
    /// # Safety
    /// As for [`Task::run`]; `to` is valid for writing the blocks of 32 lines.
    unsafe fn lay_out_left(&self, unit: Unit, tiles: &Tiles<'_>, first: usize, to: *mut u8) {
        let rows: [Left<'_>; matrix_unit::PANELS] = std::array::from_fn(|i| (self.left)(first + i).rows);
        let Operands { pieces, blocks, steps, .. } = tiles.operands(&rows[0], std::ptr::null(), self.blocks);
        for piece in 0..pieces {
            // SAFETY: the caller's word.
            unsafe {
                let to = to.add(piece * blocks * matrix_unit::block_bytes(steps));
                if tiles.al.form == Form::Lines {
                    let lines =
                        std::array::from_fn(|i| rows[i / PANEL_ROWS].starts()[piece * PANEL_ROWS + i % PANEL_ROWS]);
                    (unit.kernels.lay_out_lines)(blocks, steps, &lines, to);
                } else {
                    let panels = std::array::from_fn(|i| rows[i].starts()[piece]);
                    (unit.kernels.lay_out_left)(blocks, steps, &panels, to);
                }
            }
        }
    }

    /// [`Task::run`] where a matrix unit takes the groups' tiles, but for those at C's edge.
    ///
    /// # Safety
    /// As for [`Task::run`]; the groups are those of [`Task::groups`].
    unsafe fn on_unit(&self, unit: Unit, tiles: &Tiles<'_>, groups: &[usize], buffers: &mut TileBuffers) {
        let Tiles { al, bl, out, epilogue, .. } = tiles;
        let (blocks, steps) = (self.blocks, al.steps);
        let group_bytes = blocks * matrix_unit::block_bytes(steps);
        let left = buffers.unit_left.reserve(groups.len() * group_bytes).as_ptr();
        let right = buffers.unit_right.reserve(group_bytes).as_ptr();
        for (g, &first) in groups.iter().enumerate() {
            // SAFETY: the caller's word; the buffer has room for the groups.
            unsafe { self.lay_out_left(unit, tiles, first, left.add(g * group_bytes)) };
        }
        let mut on_unit = || {
            for j in self.columns.clone() {
                let panel = (self.right)(j);
                if panel.general || (self.place)(groups[0], j, false).width < matrix_unit::SIDE {
                    // SAFETY: the caller's word.
                    unsafe { self.column(tiles, j, &self.rows, &mut buffers.panel) };
                    continue;
                }
                let nibbles = usize::from(bl.form == Form::Nibbles);
                // SAFETY: the caller's word; the buffer has room for the panel.
                unsafe { (unit.kernels.lay_out_right[nibbles])(blocks, steps, bl.offset(), panel.bytes, right) };
                for (g, &first) in groups.iter().enumerate() {
                    let Place { at, stride, column, first: fresh, last, .. } = (self.place)(first, j, false);
                    let finish = (first..first + matrix_unit::PANELS).any(|i| (self.place)(i, j, false).finish);
                    let c = out.pointer(at, (matrix_unit::SIDE - 1) * stride + matrix_unit::SIDE);
                    let fresh = fresh && !epilogue.accumulate;
                    // Written once and not touched again.
                    let once = tiles.large && fresh && last && !finish;
                    let around = once && (c as usize | (4 * stride)).is_multiple_of(64);
                    let tile = Tile { c, stride, fresh, around };
                    // SAFETY: both operands are laid out; the tile belongs to this task; the unit is configured.
                    unsafe { (unit.run)(blocks, steps, left.add(g * group_bytes), right, tile) };
                    if finish {
                        // SAFETY: the same tile, row by row.
                        let row = |r: usize| unsafe { out.part(at + r * stride, matrix_unit::SIDE) };
                        tiles.finish((0..matrix_unit::SIDE).map(row), column);
                    }
                }
                // What lies between the groups, and after them.
                let mut done = self.rows.start;
                for &first in groups.iter().chain([&self.rows.end]) {
                    if done < first {
                        // SAFETY: the caller's word.
                        unsafe { self.column(tiles, j, &(done..first), &mut buffers.panel) };
                    }
                    done = first + matrix_unit::PANELS;
                }
            }
        };
        // SAFETY: the level has the unit.
        unsafe { (unit.kernels.with)(steps, &mut on_unit) };
    }
}
