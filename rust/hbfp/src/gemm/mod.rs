//! Products of encoded operands: C[i, j] = Σ over blocks of ldexp(Σ q_a q_w, s_a + s_w), each block's term and each sum
//! rounded once to f32, blocks in order.

mod batch;
mod cache;
pub mod convolution;
mod driver;
mod general;
pub(crate) mod strips;
mod tiles;

use crate::arch::generic::product::{Correction, PANEL_ROWS};
use crate::arch::kernels::TileKernel;
use crate::encode::blocks::Scratch;
use crate::encode::codes::Codes;
use crate::encode::filling::{Job, PlaneLines, Source, fill};
use crate::encode::panels::{Form, PanelLayout, Panels, PanelsMut, PanelsRef, Side};
use crate::encode::relayout::planes_of_nibbles;
use crate::encode::{Context, RoundingMode, check_size};
use crate::error::{Error, Result};
use crate::format::{BlockFormat, BlockShape, MAX_BLOCK};
use crate::mem::AlignedBytes;
use crate::shape::{FloatLines, FloatTensor, PlaneLayout, element_count};
use crate::sums::LineSums;
use std::sync::Mutex;

pub use strips::Coding;

/// An operand of a product. The last two dimensions are a matrix, leading ones are batch; the reduction runs along
/// `axis`, one of the last two.
#[derive(Clone, Debug)]
pub enum Operand<'a> {
    /// f32 values, encoded on the way in.
    Floats {
        /// The tensor.
        x: FloatTensor<'a>,
        /// Its reduction.
        axis: usize,
        /// Format to encode with.
        format: BlockFormat,
        /// Rounding to encode with.
        mode: RoundingMode,
    },
    /// An encoded tensor; lines must be blocked along `axis`.
    Planes {
        /// Shape, format and blocked axis.
        layout: &'a PlaneLayout,
        /// Exponent plane.
        exponents: &'a [u8],
        /// Mantissa plane.
        mantissas: &'a [u8],
        /// Its reduction.
        axis: usize,
    },
}

impl Operand<'_> {
    /// Format of the codes.
    #[must_use]
    pub fn format(&self) -> BlockFormat {
        match self {
            Self::Floats { format, .. } => *format,
            Self::Planes { layout, .. } => layout.format(),
        }
    }

    fn resolve(&self, ctx: &Context<'_>, panels: bool) -> Result<Resolved<'_>> {
        let (shape, axis) = match self {
            Self::Floats { x, axis, .. } => (x.shape(), *axis),
            Self::Planes { layout, axis, .. } => (layout.shape(), *axis),
        };
        let rank = shape.len();
        if rank < 2 || axis >= rank || axis + 2 < rank {
            let expected = "a tensor of two or more dimensions, reduced along one of the last two";
            return Err(Error::shape(expected, format!("shape {shape:?} reduced along axis {axis}")));
        }
        let lines_format = matches!(self.format().shape(), BlockShape::Line(_));
        match self {
            Self::Floats { x, axis, format, mode } => {
                let lines = x.lines(*axis)?;
                if panels && format.encodes_to_panels() {
                    return Ok(Resolved::Floats(lines, *mode));
                }
                // Tiles and whole tensors are encoded as they are held, whatever the reduction: the same planes serve both.
                Ok(Resolved::Codes(Codes::from_floats(ctx, &lines, *format, *mode)))
            }
            Self::Planes { layout, exponents, mantissas, axis } => {
                check_size("exponents", exponents.len(), layout.exponents()[0] * layout.exponents()[1])?;
                check_size("bytes of mantissas", mantissas.len(), layout.mantissas()[0] * layout.mantissas()[1])?;
                if lines_format && layout.axis != *axis {
                    let found = format!("blocks along axis {}", layout.axis);
                    return Err(Error::shape(format!("an operand blocked along its reduction, axis {axis}"), found));
                }
                let matrices = shape[..rank - 2].iter().product();
                let lines = shape[if *axis == rank - 1 { rank - 2 } else { rank - 1 }];
                if panels && lines_format && layout.format().bits() <= 8 {
                    let row = layout.mantissas()[1];
                    return Ok(Resolved::Planes(PlaneLines {
                        exponents,
                        mantissas,
                        matrices,
                        lines,
                        k: layout.k,
                        row,
                    }));
                }
                let mut codes = Codes::from_planes(layout, exponents, mantissas, *axis != rank - 1)?;
                (codes.matrices, codes.lines, codes.k) = (matrices, lines, shape[*axis]);
                Ok(Resolved::Codes(codes))
            }
        }
    }
}

enum Resolved<'a> {
    Floats(FloatLines<'a>, RoundingMode),
    Planes(PlaneLines<'a>),
    Codes(Codes),
}

impl Resolved<'_> {
    /// Makes one tall matrix of a batch, where memory allows.
    fn merge(&mut self) {
        match self {
            Self::Floats(x, _) => x.merge(),
            Self::Planes(p) => (p.matrices, p.lines) = (1, p.matrices * p.lines),
            Self::Codes(c) => (c.matrices, c.lines) = (1, c.matrices * c.lines),
        }
    }

    fn source(&self) -> Source<'_> {
        match self {
            Self::Floats(x, mode) => Source::Floats(x, *mode),
            Self::Planes(p) => Source::Planes(*p),
            Self::Codes(c) => Source::Codes(c),
        }
    }
}

/// Right operand of a product: to be laid out now, or laid out before.
#[derive(Clone, Debug)]
pub enum Right<'a> {
    /// Laid out for this product.
    Operand(Operand<'a>),
    /// Laid out once for many.
    Packed(&'a Packed),
    /// Laid out beside an earlier product.
    Kept(Kept<'a>),
}

/// Another encoding of a product's left tensor, written beside the product as a right operand for a later one: what
/// training keeps of X is its codes along the batch.
#[derive(Debug)]
pub struct Keep<'a> {
    /// Reduction of the later product, one of the last two dimensions; the tensor is one matrix.
    pub axis: usize,
    /// Format to encode with.
    pub format: BlockFormat,
    /// Rounding to encode with.
    pub mode: RoundingMode,
    /// [`kept_bytes`] bytes.
    pub bytes: &'a mut [u8],
}

/// What a product makes of its left tensor besides, in the same pass over it.
#[derive(Debug, Default)]
pub struct Beside<'a> {
    /// Another encoding.
    pub keep: Option<Keep<'a>>,
    /// Sums of the lines that are reduced, one for each row of C, in the order of [`crate::sums::column_sums`]: of dYᵀ the
    /// bias gradient. The tensor is one matrix.
    pub sums: Option<&'a mut [f32]>,
}

/// What [`Keep`] wrote.
#[derive(Clone, Copy, Debug)]
pub struct Kept<'a> {
    /// Lines (columns of C).
    pub lines: usize,
    /// Elements of the reduction.
    pub k: usize,
    /// Format of the codes.
    pub format: BlockFormat,
    /// As many bytes as were kept, by the same level.
    pub bytes: &'a [u8],
}

/// Lines of a matrix of floats along its reduction, to be summed.
fn summed_lines<'a>(of: &Operand<'a>) -> Result<FloatLines<'a>> {
    match of {
        Operand::Floats { x, axis, .. } if x.shape().len() == 2 => x.lines(*axis),
        _ => Err(Error::shape("one matrix of floats to sum", "another operand")),
    }
}

impl<'a> Keep<'a> {
    fn lines<'x>(&self, of: &Operand<'x>) -> Result<FloatLines<'x>> {
        match of {
            Operand::Floats { x, .. } if x.shape().len() == 2 && self.axis < 2 => x.lines(self.axis),
            _ => Err(Error::shape("one matrix of floats to keep, along one of its two axes", "another operand")),
        }
    }

    fn job(self, ctx: &Context<'_>, source: &'a Source<'a>) -> Result<Job<'a>> {
        let [_, lines, k] = source.shape();
        let expected = kept_bytes(ctx, lines, k, self.format);
        let Some(expected) = expected else {
            return Err(Error::shape("a format in blocks of up to 8 bits, to keep", self.format.to_string()));
        };
        check_size("bytes to keep the operand in", self.bytes.len(), expected)?;
        let layout = kept_layout(self.format, source.shape(), ctx.kernels.columns);
        let (bytes, general) = self.bytes.split_at_mut(layout.bytes());
        Ok(Job::new(source, self.format, layout, PanelsMut::new(bytes, general)))
    }
}

impl<'a> Kept<'a> {
    /// # Errors
    /// [`Error::Shape`] for another number of bytes than such an operand has at this level.
    fn panels(&self, ctx: &Context<'_>) -> Result<(PanelLayout, PanelsRef)> {
        let Some(len) = kept_bytes(ctx, self.lines, self.k, self.format) else {
            return Err(Error::shape("a format in blocks of up to 8 bits", self.format.to_string()));
        };
        check_size("bytes of a kept operand", self.bytes.len(), len)?;
        let layout = kept_layout(self.format, [1, self.lines, self.k], ctx.kernels.columns);
        Ok((layout, PanelsRef::new(self.bytes.split_at(layout.bytes()))))
    }
}

/// Bytes of a right operand of `lines` lines of `k` elements as [`Keep`] writes it, at the level of `ctx`. None: the format
/// cannot be kept so.
#[must_use]
pub fn kept_bytes(ctx: &Context<'_>, lines: usize, k: usize, format: BlockFormat) -> Option<usize> {
    let line = matches!(format.shape(), BlockShape::Line(n) if n <= MAX_BLOCK);
    // An element takes less than ROOM bytes, also where it is alone in its strip.
    if !line || !format.encodes_to_panels() || element_count(&[lines, k, ROOM]).ok()? == 0 {
        return None;
    }
    let layout = kept_layout(format, [1, lines, k], ctx.kernels.columns);
    Some(layout.bytes() + layout.panel_count())
}

/// Panels of a kept operand, bytes of one, and its lines: what lies behind all panels is one byte for each. None: the
/// format cannot be kept.
#[must_use]
pub fn kept_panels(ctx: &Context<'_>, lines: usize, k: usize, format: BlockFormat) -> Option<[usize; 3]> {
    kept_bytes(ctx, lines, k, format)?;
    let layout = kept_layout(format, [1, lines, k], ctx.kernels.columns);
    Some([layout.panel_count(), layout.panel_bytes(), layout.width])
}

/// Lays a right operand out in `bytes`, as [`Keep`] does beside a product; it is one matrix of `lines` × K.
///
/// # Errors
/// [`Error::Shape`] for batches, another number of bytes than [`kept_bytes`] and formats without one; [`Error::Code`] for
/// planes that no encoder writes.
pub fn keep(ctx: &Context<'_>, operand: &Operand<'_>, bytes: &mut [u8]) -> Result<()> {
    let format = operand.format();
    let resolved = operand.resolve(ctx, true)?;
    let source = resolved.source();
    if source.matrices() != 1 {
        return Err(Error::shape("one matrix to keep", format!("a batch of {}", source.matrices())));
    }
    let Some(len) = kept_bytes(ctx, source.lines(), source.k(), format) else {
        return Err(Error::shape("a format in blocks of up to 8 bits, to keep", format.to_string()));
    };
    check_size("bytes to keep the operand in", bytes.len(), len)?;
    let layout = kept_layout(format, source.shape(), ctx.kernels.columns);
    let (bytes, general) = bytes.split_at_mut(layout.bytes());
    let panels = PanelsMut { fresh: true, ..PanelsMut::new(&mut *bytes, general) };
    fill(ctx, Job::new(&source, format, layout, panels), &mut Vec::new())?;
    // Panels that the last strip has beyond the last line: nothing reads them, but they are copied and compared.
    bytes[layout.lines.div_ceil(layout.width) * layout.panel_bytes()..].fill(0);
    Ok(())
}

impl Kept<'_> {
    /// The planes of `layout`, that of a matrix of `lines` × K blocked along K, that it holds: (exponents, mantissas).
    /// Blocks of zeros get c = 0.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of bytes than such an operand has at this level, or another layout.
    pub fn planes(&self, ctx: &Context<'_>, layout: &PlaneLayout) -> Result<(Vec<u8>, Vec<u8>)> {
        if layout.shape() != [self.lines, self.k] || layout.axis != 1 || layout.format() != self.format {
            let expected = format!("the layout of [{}, {}] in {}", self.lines, self.k, self.format);
            return Err(Error::shape(expected, format!("{:?} in {}", layout.shape(), layout.format())));
        }
        let (panel_layout, panels) = self.panels(ctx)?;
        if panel_layout.form == Form::Nibbles && self.format.bits() == 4 {
            return Ok(planes_of_nibbles(&panel_layout, &self.bytes[..panel_layout.bytes()]));
        }
        let mut codes = driver::codes_of_panels(&panel_layout, panels, self.format);
        codes.clear_zero_blocks();
        Ok(codes.to_planes(layout))
    }
}

/// A right operand in the layout of a level's kernels.
#[derive(Debug)]
pub struct Packed {
    format: BlockFormat,
    level: crate::Level,
    columns: usize,
    content: PackedContent,
}

#[derive(Debug)]
enum PackedContent {
    Panels(PanelLayout, Panels),
    Codes(Codes),
}

impl Packed {
    /// Format of the codes.
    #[must_use]
    pub fn format(&self) -> BlockFormat {
        self.format
    }
    /// Level whose kernels read it.
    #[must_use]
    pub fn level(&self) -> crate::Level {
        self.level
    }
    /// Lines (columns of C) and elements of the reduction.
    #[must_use]
    pub fn shape(&self) -> (usize, usize) {
        match &self.content {
            PackedContent::Panels(layout, _) => (layout.lines, layout.k),
            PackedContent::Codes(codes) => (codes.lines, codes.k),
        }
    }
    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.content {
            PackedContent::Panels(_, panels) => panels.bytes.capacity() + panels.general.len(),
            PackedContent::Codes(codes) => 2 * codes.codes.len() + codes.exponents.len(),
        }
    }
}

/// Buffers of products, reused from call to call. They grow to the panels of the largest product, 1 + 8 / B bytes an
/// element of both operands, and 40 (B = 16) to 450 KiB (B = 1024) a thread. For tiles of 32 × 32, at levels avx512vnni and
/// amx, a thread also holds the left panels of a task in their order, up to 5/8 of the second-level cache; at amx twice
/// that, once there were products with lines that can be aligned and with others. What holds a MiB or more is rounded up to
/// large pages, 2 MiB each.
#[derive(Debug, Default)]
pub struct Workspace {
    left: Panels,
    right: Panels,
    /// Right operands of the groups of a convolution, its kernel in the order of its taps, random bits.
    groups: Vec<Panels>,
    taps: AlignedBytes,
    planes: [AlignedBytes; 2],
    /// Of blocks.
    sums: AlignedBytes,
    scratch: Vec<Mutex<Scratch>>,
}

impl Workspace {
    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let scratch = |s: &Mutex<Scratch>| s.lock().map_or(0, |s| s.bytes());
        let groups: usize = self.groups.iter().map(|group| group.bytes.capacity()).sum();
        let planes: usize = self.planes.iter().map(AlignedBytes::capacity).sum();
        self.left.bytes.capacity()
            + self.right.bytes.capacity()
            + groups
            + self.taps.capacity()
            + planes
            + self.sums.capacity()
            + self.scratch.iter().map(scratch).sum::<usize>()
    }
}

/// What happens to C around the sums.
#[derive(Clone, Copy, Debug, Default)]
pub struct Epilogue<'a> {
    /// Start from the C that is given, instead of +0.0.
    pub accumulate: bool,
    /// Added last, one element per column.
    pub bias: Option<&'a [f32]>,
}

/// More bytes than panels of any form take for an element.
const ROOM: usize = 1024;

/// Offset that makes codes of `bits` bits unsigned.
fn offset(bits: u8) -> i32 {
    1 << (bits - 1)
}

/// Whether panels can hold an operand: the rest goes by codes.
fn fits_panels(format: BlockFormat, block: usize) -> bool {
    format.bits() <= 8 && block <= MAX_BLOCK
}

/// The first of `tiles` that multiplies blocks of two formats exactly; none: the general path does.
fn fitting(
    tiles: &'static [TileKernel],
    block: usize,
    left: BlockFormat,
    right: BlockFormat,
) -> Option<&'static TileKernel> {
    // The exponent rides in the accumulator while |D| < 2^22.
    let rides = (block as i64) * i64::from(left.max_code()) * i64::from(right.max_code()) < 1 << 22;
    tiles.iter().find(|tile| rides && (tile.fits)(block.div_ceil(4), left.max_code(), right.bits()))
}

/// Layout of a right operand that is kept.
fn kept_layout(format: BlockFormat, shape: [usize; 3], columns: usize) -> PanelLayout {
    let block = format.block_along(shape[2]);
    let layout = PanelLayout::new(shape, block, columns, Side::Right { offset: offset(format.bits()) });
    if format.bits() <= 4 { layout.in_nibbles() } else { layout }
}

/// Lays out a right operand once. It is read as one matrix of `lines` × K.
///
/// # Errors
/// [`Error::Shape`] for batches; otherwise as [`product`].
pub fn prepack(ctx: &Context<'_>, operand: &Operand<'_>) -> Result<Packed> {
    let format = operand.format();
    let resolved = operand.resolve(ctx, true)?;
    let source = resolved.source();
    if source.matrices() != 1 {
        return Err(Error::shape("one matrix to prepack", format!("a batch of {}", source.matrices())));
    }
    let (level, columns) = (ctx.kernels.level(), ctx.kernels.columns);
    let block = format.block_along(source.k());
    let content = if fits_panels(format, block) {
        let layout = kept_layout(format, source.shape(), columns);
        let mut panels = Panels::default();
        fill(ctx, Job::new(&source, format, layout, panels.reserve(&layout)), &mut Vec::new())?;
        PackedContent::Panels(layout, panels)
    } else {
        match operand.resolve(ctx, false)? {
            Resolved::Codes(codes) => PackedContent::Codes(codes),
            _ => unreachable!("asked for codes"),
        }
    };
    Ok(Packed { format, level, columns, content })
}

/// Lays an operand out in `workspace` as a product of two operands of its format would, and no more: what encoding costs
/// by itself, for benches. Formats outside the panels' range are left alone.
///
/// # Errors
/// As [`product`].
pub fn lay_out(ctx: &Context<'_>, operand: &Operand<'_>, left: bool, workspace: &mut Workspace) -> Result<()> {
    let format = operand.format();
    let resolved = operand.resolve(ctx, true)?;
    let source = resolved.source();
    let block = format.block_along(source.k());
    if !fits_panels(format, block) {
        return Ok(());
    }
    let offset = offset(format.bits());
    let tiles = ctx.kernels.tiles;
    let tile = tiles.iter().find(|tile| (tile.fits)(block.div_ceil(4), format.max_code(), format.bits()));
    let correction = tile.map_or(Correction::Total, |tile| tile.correction);
    let (width, side, panels) = if left {
        (PANEL_ROWS, Side::Left { correction, offset }, &mut workspace.left)
    } else {
        (ctx.kernels.columns, Side::Right { offset }, &mut workspace.right)
    };
    let layout = PanelLayout::new(source.shape(), block, width, side);
    fill(ctx, Job::new(&source, format, layout, panels.reserve(&layout)), &mut workspace.scratch)
}

/// `out` ← A · Bᵀ along their reductions, [matrices, lines of A, lines of B], row-major.
///
/// # Errors
/// [`Error::Shape`] when sizes, batches or block boundaries along the reduction differ; [`Error::Code`] for planes that
/// no encoder writes (`out` may have been written then).
///
/// # Panics
/// If a packed operand was made for kernels of another width.
pub fn product(
    ctx: &Context<'_>,
    a: &Operand<'_>,
    b: &Right<'_>,
    out: &mut [f32],
    epilogue: Epilogue<'_>,
    workspace: &mut Workspace,
) -> Result<()> {
    product_beside(ctx, a, Beside::default(), b, out, epilogue, workspace)
}

/// [`product`], which also makes something else of the left tensor.
///
/// # Errors
/// As [`product`]; [`Error::Shape`] for something to keep or to sum that is no matrix of floats, or not of the size.
///
/// # Panics
/// As [`product`].
pub fn product_beside(
    ctx: &Context<'_>,
    a: &Operand<'_>,
    Beside { keep, sums }: Beside<'_>,
    b: &Right<'_>,
    out: &mut [f32],
    epilogue: Epilogue<'_>,
    workspace: &mut Workspace,
) -> Result<()> {
    let mut left = a.resolve(ctx, true)?;
    let right = match b {
        Right::Operand(b) => Some(b.resolve(ctx, true)?),
        Right::Packed(_) | Right::Kept(_) => None,
    };
    let kept_lines = keep.as_ref().map(|keep| keep.lines(a)).transpose()?;
    let kept_source = kept_lines.as_ref().zip(keep.as_ref()).map(|(x, keep)| Source::Floats(x, keep.mode));
    let kept = kept_source.as_ref().zip(keep).map(|(source, keep)| keep.job(ctx, source)).transpose()?;
    let (af, bf, n, bk, b_matrices) = match (b, &right) {
        (Right::Packed(p), _) => (a.format(), p.format, p.shape().0, p.shape().1, 1),
        (Right::Kept(kept), _) => (a.format(), kept.format, kept.lines, kept.k, 1),
        (Right::Operand(o), Some(r)) => {
            let s = r.source();
            (a.format(), o.format(), s.lines(), s.k(), s.matrices())
        }
        _ => unreachable!("resolved above"),
    };
    if b_matrices == 1 {
        left.merge();
    }
    let source = left.source();
    let (matrices, m, k) = (source.matrices(), source.lines(), source.k());
    if k != bk {
        return Err(Error::shape(format!("equal reductions; the left operand's has {k} elements"), format!("{bk}")));
    }
    // A left operand of several matrices against one right matrix is a taller left operand.
    let (matrices, m) = if b_matrices == 1 && matrices != 1 { (1, matrices * m) } else { (matrices, m) };
    if matrices != b_matrices {
        let expected = format!("equal batches, or one right matrix; the left operand has {matrices}");
        return Err(Error::shape(expected, b_matrices.to_string()));
    }
    let block = af.block_along(k);
    if block != bf.block_along(k) {
        let expected = format!("equal block boundaries along the reduction of {k}: {af} has blocks of {block}");
        return Err(Error::shape(expected, format!("{bf} with blocks of {}", bf.block_along(k))));
    }
    check_size("elements of out", out.len(), matrices * m * n)?;
    if let Some(bias) = epilogue.bias {
        check_size("elements of bias", bias.len(), n)?;
    }
    let mut summed = sums.map(|sums| LineSums::new(summed_lines(a)?, sums)).transpose()?;
    if out.is_empty() {
        summed.into_iter().for_each(|summed| summed.finish(ctx));
        return kept.map_or(Ok(()), |job| fill(ctx, job, &mut workspace.scratch));
    }
    if !(fits_panels(af, block) && fits_panels(bf, block)) {
        summed.into_iter().for_each(|summed| summed.finish(ctx));
        if let Some(job) = kept {
            fill(ctx, job, &mut workspace.scratch)?;
        }
        let to_codes = |operand: &Operand<'_>, resolved: Resolved<'_>| match resolved {
            Resolved::Codes(codes) => Ok(codes),
            _ => match operand.resolve(ctx, false)? {
                Resolved::Codes(codes) => Ok(codes),
                _ => unreachable!("asked for codes"),
            },
        };
        let left = to_codes(a, left)?;
        let shape = general::Shape { matrices, m, n, k, block };
        let unpacked;
        let right = match (b, right) {
            (Right::Packed(Packed { content: PackedContent::Codes(codes), .. }), _) => codes,
            (Right::Packed(Packed { content: PackedContent::Panels(layout, panels), format, .. }), _) => {
                unpacked = driver::codes_of_panels(layout, panels.as_ref(), *format);
                &unpacked
            }
            (Right::Kept(kept), _) => {
                let (layout, panels) = kept.panels(ctx)?;
                unpacked = driver::codes_of_panels(&layout, panels, kept.format);
                &unpacked
            }
            (Right::Operand(o), Some(r)) => {
                unpacked = to_codes(o, r)?;
                &unpacked
            }
            _ => unreachable!("resolved above"),
        };
        general::product(ctx, &left, right, shape, out, epilogue);
        return Ok(());
    }
    let columns = ctx.kernels.columns;
    let fitting = |tiles: &'static [TileKernel]| fitting(tiles, block, af, bf);
    let resolved = right.as_ref().map(Resolved::source);
    let side = Side::Right { offset: offset(bf.bits()) };
    let mut right_layout = match (b, &resolved) {
        (Right::Packed(packed), _) => {
            assert_eq!(packed.columns, columns, "a packed operand of another level");
            let PackedContent::Panels(layout, _) = &packed.content else { unreachable!("8 bits or fewer") };
            *layout
        }
        (Right::Kept(kept), _) => kept.panels(ctx)?.0,
        (_, Some(right)) => PanelLayout::new(right.shape(), block, columns, side),
        _ => unreachable!("resolved above"),
    };
    // A few rows are done before nibbles could be unpacked.
    let nibbles = right_layout.form == Form::Nibbles && m <= driver::NIBBLE_ROWS;
    let from_nibbles = if nibbles { fitting(ctx.kernels.nibble_tiles) } else { None };
    let kernel = from_nibbles.or_else(|| fitting(ctx.kernels.tiles));
    let correction = kernel.map_or(Correction::Total, |kernel| kernel.correction);
    let side = Side::Left { correction, offset: offset(bf.bits()) };
    let left_layout = PanelLayout::new(source.shape(), block, PANEL_ROWS, side);
    // Panels end with each left matrix, so several of them against one right matrix stay apart.
    right_layout.shared = right_layout.matrices != left_layout.matrices;
    let Workspace { left, right: right_panels, sums, scratch, .. } = workspace;
    let kernel =
        tiles::Kernel { tile: kernel, from_nibbles: from_nibbles.is_some(), max_codes: [af.max_code(), bf.max_code()] };
    if let (Source::Floats(x, x_mode), Some(Source::Floats(y, y_mode))) = (source, resolved)
        && kept.is_none()
        && !(epilogue.accumulate || epilogue.bias.is_some())
        && batch::takes(ctx, &left_layout, &right_layout)
    {
        let right_layout = PanelLayout::new([matrices, n, k], block, ctx.kernels.columns_for(n), right_layout.side);
        let left = batch::Side { x, mode: x_mode, format: af, layout: left_layout };
        let right = batch::Side { x: y, mode: y_mode, format: bf, layout: right_layout };
        batch::multiply(ctx, [left, right], out, kernel, scratch);
        return Ok(());
    }
    let mut left = Job::new(&source, af, left_layout, left.reserve(&left_layout));
    if let Some(summed) = &mut summed
        && source.sums_blocks(block)
    {
        left.sums = Some(summed.by_blocks(sums));
    }
    let right = match (b, &resolved) {
        (Right::Packed(Packed { content: PackedContent::Panels(_, panels), .. }), _) => {
            driver::Right::Packed(panels.as_ref())
        }
        (Right::Kept(kept), _) => driver::Right::Packed(kept.panels(ctx)?.1),
        (_, Some(source)) => {
            let panels = right_panels.reserve(&right_layout);
            driver::Right::Fresh(Job::new(source, bf, right_layout, panels))
        }
        _ => unreachable!("resolved above"),
    };
    driver::multiply(ctx, left, kept, right, right_layout, out, epilogue, kernel, scratch)?;
    summed.into_iter().for_each(|summed| summed.finish(ctx));
    Ok(())
}
