//! Tiles of C over the panels of a task: each by the kernel that fits it.
#![allow(unsafe_code, reason = "calls of kernels, and tasks that write disjoint tiles")]

use super::cache::Caches;
use super::{Epilogue, general};
use crate::arch::generic::aligned::{PANELS, SIDE};
use crate::arch::generic::product::{Operands, PANEL_ROWS, Tile, b_block_bytes};
use crate::arch::generic::{aligned, matrix_unit};
use crate::arch::kernels::{AlignedKernels, MatrixUnitKernels, TileFn, TileKernel, TileShape, UnitTileFn};
use crate::encode::blocks::{Group, TileBuffers};
use crate::encode::panels::{Form, PanelLayout};
use crate::encode::{Context, forms};
use crate::mem::{AlignedBytes, SharedMut};
use std::ops::Range;

/// The kernel of a product; without one, every tile takes the general path.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub(super) tile: Option<&'static TileKernel>,
    pub(super) from_nibbles: bool,
    /// The largest code of the left and of the right operand.
    pub(super) max_codes: [i32; 2],
}

/// Widest B panel.
const MAX_COLUMNS: usize = 32;

/// A tile on its own.
#[repr(align(64))]
struct Buffer<const N: usize>([f32; N]);

impl<const N: usize> Default for Buffer<N> {
    fn default() -> Self {
        Self([0.0; N])
    }
}

/// Of a panel, and of a group.
type PanelTile = Buffer<{ PANEL_ROWS * MAX_COLUMNS }>;
type WideTile = Buffer<{ SIDE * SIDE }>;

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
    wide: Option<Wide>,
    /// Whether C would push all else out of the second-level cache.
    large: bool,
    /// Whether no NaN is added to sums.
    plain_bias: bool,
}

/// Kernels for tiles of 32 × 32.
#[derive(Clone, Copy)]
struct Wide {
    /// For lines that can be aligned.
    aligned: &'static AlignedKernels,
    /// Block by block, on a matrix unit; none: the level has none, or it does not pay for such short blocks.
    unit: Option<(&'static MatrixUnitKernels, UnitTileFn)>,
    /// Largest codes, and how far they can be shifted.
    max_codes: [i32; 2],
    room: [i32; 2],
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
        let large = size_of::<f32>() * out.len() >= 2 * Caches::get().l2;
        let plain_bias = !epilogue.bias.is_some_and(|bias| bias.iter().any(|x| x.is_nan()));
        let room = kernel.max_codes.map(aligned::room);
        let unit = ctx.kernels.matrix_unit.as_ref().filter(|_| matrix_unit::fits(al.steps));
        let unit = unit.map(|kernels| (kernels, (kernels.tile)(al.steps)));
        // Codes without room are seldom aligned: without a unit, looking whether they are does not pay.
        let aligns = aligned::fits(al.steps) && (unit.is_some() || !room.contains(&0));
        let fits = run.is_some() && bl.width == SIDE && (unit.is_some() || aligns);
        let aligned = ctx.kernels.aligned.as_ref().filter(|_| fits);
        let wide = aligned.map(|aligned| Wide { aligned, unit, max_codes: kernel.max_codes, room });
        let from_nibbles = kernel.from_nibbles;
        Self { ctx, al, bl, out, epilogue, run, fewest_rows, from_nibbles, wide, large, plain_bias }
    }

    /// Whether products of so many left panels go by tiles of 32 × 32 where they can.
    pub(super) fn wide(&self, panels: usize) -> bool {
        self.wide.is_some_and(|wide| panels >= wide.aligned.fewest_panels)
    }

    /// Whether there is a kernel for these operands; else every tile takes the general path.
    pub(super) fn has_kernel(&self) -> bool {
        self.run.is_some()
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
    unsafe fn tile(&self, a: LeftBlocks<'_>, b: PanelBlocks, blocks: usize, place: Place, buffer: &mut PanelTile) {
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
            if let Some(bias) = self.epilogue.bias {
                let bias = &bias[column..][..row.len()];
                row.iter_mut().zip(bias).for_each(|(x, &bias)| *x = general::finish(*x, Some(bias)));
            } else {
                row.iter_mut().for_each(|x| *x = general::finish(*x, None));
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
    /// Number of the left panels and blocks: tasks of one number find what was laid out of them. None: laid out anew.
    pub(super) number: Option<usize>,
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
        let wide = tiles.wide.filter(|_| self.blocks > 0 && self.columns.len() > 1);
        let mut groups = std::mem::take(&mut buffers.groups);
        if wide.is_none() || self.number.is_none() || buffers.groups_of != self.number {
            groups.clear();
            if let Some(wide) = wide {
                self.group(wide, &mut groups);
                // SAFETY: the caller's word.
                unsafe { self.align_groups(wide, tiles, &mut groups, buffers) };
            }
        }
        // SAFETY: the caller's word.
        unsafe {
            match wide.filter(|_| !groups.is_empty()) {
                Some(wide) => self.by_groups(wide, tiles, &mut groups, buffers),
                None => self.columns.clone().for_each(|j| self.column(tiles, j, &self.rows, &mut buffers.panel)),
            }
        }
        (buffers.groups, buffers.groups_of) = (groups, self.number.filter(|_| wide.is_some()));
    }

    /// The tiles of a B panel and some A panels.
    ///
    /// # Safety
    /// As for [`Task::run`].
    unsafe fn column(&self, tiles: &Tiles<'_>, j: usize, rows: &Range<usize>, panel: &mut AlignedBytes) {
        let mut buffer = PanelTile::default();
        let b = tiles.right_panel((self.right)(j), self.blocks, panel);
        for i in rows.clone() {
            let a = (self.left)(i);
            let place = (self.place)(i, j, a.general | b.general);
            // SAFETY: the caller's word.
            unsafe { tiles.tile(a, b, self.blocks, place, &mut buffer) };
        }
    }

    /// The A panels, eight by eight, that tiles of 32 × 32 take.
    fn group(&self, wide: Wide, groups: &mut Vec<Group>) {
        let place = |i: usize| (self.place)(i, self.columns.start, false);
        let group = |first: usize| {
            let panels = first..(first + PANELS).min(self.rows.end);
            let follows = |i: usize| place(i + 1).at == place(i).at + PANEL_ROWS * place(i).stride;
            let whole = panels.len() == PANELS && panels.clone().all(|i| place(i).height == PANEL_ROWS);
            let whole = whole && (first..panels.end - 1).all(follows);
            let takes = panels.len() >= wide.aligned.fewest_panels && !panels.clone().any(|i| (self.left)(i).general);
            takes.then(|| Group { panels, sum: None, laid_out: (whole && wide.unit.is_some()).then_some(false) })
        };
        groups.extend(self.rows.clone().step_by(PANELS).filter_map(group));
    }

    /// The panels from `first` on as a matrix unit reads them block by block, piece by piece.
    ///
    /// # Safety
    /// As for [`Task::run`]; `to` is valid for writing the blocks of 32 lines.
    unsafe fn lay_out_left(&self, unit: &MatrixUnitKernels, tiles: &Tiles<'_>, first: usize, to: *mut u8) {
        let rows: [Left<'_>; PANELS] = std::array::from_fn(|i| (self.left)(first + i).rows);
        let Operands { pieces, blocks, steps, .. } = tiles.operands(&rows[0], std::ptr::null(), self.blocks);
        for piece in 0..pieces {
            // SAFETY: the caller's word.
            unsafe {
                let to = to.add(piece * blocks * matrix_unit::block_bytes(steps));
                if tiles.al.form == Form::Lines {
                    let lines =
                        std::array::from_fn(|i| rows[i / PANEL_ROWS].starts()[piece * PANEL_ROWS + i % PANEL_ROWS]);
                    (unit.lay_out_lines)(blocks, steps, &lines, to);
                } else {
                    let panels = std::array::from_fn(|i| rows[i].starts()[piece]);
                    (unit.lay_out_left)(blocks, steps, &panels, to);
                }
            }
        }
    }

    /// Aligns the groups that can be, where C starts at zero.
    ///
    /// # Safety
    /// As for [`Task::run`].
    unsafe fn align_groups(&self, wide: Wide, tiles: &Tiles<'_>, groups: &mut [Group], buffers: &mut TileBuffers) {
        let (blocks, steps) = (self.blocks, tiles.al.steps);
        let first = (self.place)(self.rows.start, self.columns.start, false).first;
        if !aligned::fits(steps) || !first || tiles.epilogue.accumulate {
            return;
        }
        let line_bytes = aligned::line_bytes(blocks, steps);
        let to = buffers.aligned_left.reserve(groups.len() * line_bytes).as_ptr();
        for (g, group) in groups.iter_mut().enumerate() {
            // SAFETY: the caller's word; the buffer has room for the groups.
            group.sum = unsafe { self.align_left(wide, tiles, &group.panels, to.add(g * line_bytes)) };
        }
    }

    /// A group aligned, if it can be: the largest sum of a line's codes.
    ///
    /// # Safety
    /// As for [`Task::run`]; `to` is valid for writing 32 aligned lines.
    unsafe fn align_left(&self, wide: Wide, tiles: &Tiles<'_>, panels: &Range<usize>, to: *mut u8) -> Option<u32> {
        let rows: [Left<'_>; PANELS] =
            std::array::from_fn(|i| (self.left)((panels.start + i).min(panels.end - 1)).rows);
        let starts: [&[*const u8]; PANELS] = std::array::from_fn(|i| rows[i].starts());
        let of = tiles.operands(&rows[0], std::ptr::null(), self.blocks);
        let lay_out = wide.aligned.lay_out_left[usize::from(tiles.al.form == Form::Lines)];
        // SAFETY: the caller's word.
        unsafe { lay_out(of.pieces, of.blocks, of.steps, wide.room[0], &starts[..panels.len()], to) }
    }

    /// [`Task::run`] by tiles of 32 × 32, where the groups can be aligned or a matrix unit takes them.
    ///
    /// # Safety
    /// As for [`Task::run`]; the groups are those of [`Task::group`], and [aligned](Task::align_groups).
    unsafe fn by_groups(&self, wide: Wide, tiles: &Tiles<'_>, groups: &mut [Group], buffers: &mut TileBuffers) {
        let Tiles { al, bl, .. } = tiles;
        let (blocks, steps) = (self.blocks, al.steps);
        let nibbles = usize::from(bl.form == Form::Nibbles);
        let (pieces, line_bytes) = (aligned::pieces(blocks, steps), aligned::line_bytes(blocks, steps));
        let kernels = wide.aligned;
        let group_bytes = blocks * matrix_unit::block_bytes(steps);
        let mut run = || {
            for j in self.columns.clone() {
                let panel = (self.right)(j);
                if panel.general {
                    // SAFETY: the caller's word.
                    unsafe { self.column(tiles, j, &self.rows, &mut buffers.panel) };
                    continue;
                }
                // The largest code of the right lines, aligned.
                let code = if groups.iter().any(|group| group.sum.is_some()) {
                    let to = buffers.aligned_right.reserve(line_bytes).as_ptr();
                    let lay_out = kernels.lay_out_right[nibbles];
                    // SAFETY: the caller's word; the buffer has room for the panel.
                    unsafe { lay_out(blocks, steps, bl.offset(), wide.room[1], panel.bytes, to) }
                        .map(|places| (wide.max_codes[1] as u64) << places)
                } else {
                    None
                };
                let exact = |sum: u32, code: u64| u64::from(sum) * code < aligned::EXACT;
                let narrow = (self.place)(groups[0].panels.start, j, false).width < SIDE;
                let mut laid_out = false;
                let mut done = self.rows.start;
                for g in 0..groups.len() {
                    let Range { start, end } = groups[g].panels;
                    let aligned = groups[g].sum.zip(code).is_some_and(|(sum, code)| exact(sum, code));
                    let by_blocks = wide.unit.zip(groups[g].laid_out).filter(|_| !aligned && !narrow);
                    if !aligned && by_blocks.is_none() {
                        continue;
                    }
                    // What the unit has left out before.
                    if done < start {
                        // SAFETY: the caller's word.
                        unsafe { self.column(tiles, j, &(done..start), &mut buffers.panel) };
                    }
                    done = end;
                    let Some(((unit, run), group_laid_out)) = by_blocks else {
                        let (a, b) = (buffers.aligned_left.as_ptr(), buffers.aligned_right.as_ptr());
                        // SAFETY: both operands are laid out.
                        unsafe {
                            let a = a.add(g * line_bytes);
                            self.wide_tile(tiles, &groups[g].panels, j, tiles.plain_bias, |tile, bias, rows| {
                                (kernels.tile)(pieces, a, b, bias, tile, rows);
                            });
                        }
                        continue;
                    };
                    let left = buffers.unit_left.reserve(groups.len() * group_bytes).as_ptr();
                    let right = buffers.unit_right.reserve(group_bytes).as_ptr();
                    // SAFETY: the caller's word; the buffers have room for the groups, and for the panel.
                    unsafe {
                        let left = left.add(g * group_bytes);
                        if !group_laid_out {
                            self.lay_out_left(unit, tiles, start, left);
                            groups[g].laid_out = Some(true);
                        }
                        if !laid_out {
                            let lay_out = unit.lay_out_right[nibbles];
                            lay_out(blocks, steps, bl.offset(), panel.bytes, right);
                            laid_out = true;
                        }
                        let mut run = || {
                            self.wide_tile(tiles, &(start..end), j, false, |tile, _, _| {
                                run(blocks, steps, left, right, tile)
                            });
                        };
                        if steps.is_multiple_of(aligned::PIECE) {
                            run();
                        } else {
                            (unit.with)(steps, &mut run);
                        }
                    }
                }
                if done < self.rows.end {
                    // SAFETY: the caller's word.
                    unsafe { self.column(tiles, j, &(done..self.rows.end), &mut buffers.panel) };
                }
            }
        };
        // SAFETY: the level has these kernels.
        unsafe { (kernels.with)(&mut run) };
    }

    /// The tile of a group of panels and a B panel by `kernel`; one that sticks out, or whose rows lie apart, goes through
    /// a buffer. The kernel is given the bias of the tile's columns, or zeros, if it `adds_bias`, and the rows that matter.
    ///
    /// # Safety
    /// As for [`Task::run`]; `kernel` writes a tile of 32 × 32.
    unsafe fn wide_tile(
        &self,
        tiles: &Tiles<'_>,
        panels: &Range<usize>,
        j: usize,
        adds_bias: bool,
        kernel: impl Fn(Tile, &[f32; SIDE], usize),
    ) {
        let Tiles { out, epilogue, .. } = tiles;
        let place = |i: usize| (self.place)(i, j, false);
        let Place { at, stride, column, first, last, width, .. } = place(panels.start);
        let mut finish = panels.clone().any(|i| place(i).finish);
        let mut bias = [0.0; SIDE];
        if adds_bias && finish {
            if let Some(all) = epilogue.bias {
                bias[..width].copy_from_slice(&all[column..column + width]);
            }
            finish = false;
        }
        let fresh = first && !epilogue.accumulate;
        let follows = |i: usize| place(i + 1).at == at + (i + 1 - panels.start) * PANEL_ROWS * stride;
        let whole = panels.len() == PANELS
            && width == SIDE
            && place(panels.end - 1).height == PANEL_ROWS
            && (panels.start..panels.end - 1).all(follows);
        if whole {
            let c = out.pointer(at, (SIDE - 1) * stride + SIDE);
            // Written once and not touched again.
            let once = tiles.large && fresh && last && !finish;
            let around = once && (c as usize | (4 * stride)).is_multiple_of(64);
            kernel(Tile { c, stride, fresh, around }, &bias, SIDE);
            if finish {
                // SAFETY: the same tile, row by row.
                let row = |r: usize| unsafe { out.part(at + r * stride, SIDE) };
                tiles.finish((0..SIDE).map(row), column);
            }
            return;
        }
        debug_assert!(fresh, "only aligned products, which start at zero, stick out");
        let mut buffer = WideTile::default();
        let tile = Tile { c: buffer.0.as_mut_ptr(), stride: SIDE, fresh: true, around: false };
        kernel(tile, &bias, panels.len() * PANEL_ROWS);
        for (i, from) in panels.clone().zip(buffer.0.chunks_exact(PANEL_ROWS * SIDE)) {
            let Place { at, stride, height, width, .. } = place(i);
            let rows = (0..height).map(|r| {
                // SAFETY: the tile belongs to this task; each of its rows is taken once at a time.
                let row = unsafe { out.part(at + r * stride, width) };
                row.copy_from_slice(&from[SIDE * r..][..width]);
                row
            });
            if finish {
                tiles.finish(rows, column);
            } else {
                rows.for_each(drop);
            }
        }
    }
}
