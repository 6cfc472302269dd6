//! One table of kernels per level: the generic algorithms compiled for its instructions.

use super::generic::aligned::{self, PANELS, SIDE};
use super::generic::encode::{
    BlockPlace, LineRun, NEAREST_AWAY, NEAREST_EVEN, PanelCoding, STOCHASTIC, Scaling, TOWARD_ZERO,
};
use super::generic::matrix_unit;
use super::generic::narrow_groups;
use super::generic::philox::Counters;
use super::generic::product::{Correction, Lines, Operands, Panel, Tile};
use super::generic::straight;
use super::generic::unit_rows;
use super::level::Level;
use crate::rng::Seed;

/// C tile += A · B panel; conditions as for [`super::generic::product::tile_dot4`].
pub(crate) type TileFn = unsafe fn(of: Operands, c: Tile);
/// The same for a matrix unit; conditions as for [`super::generic::matrix_unit::tile`].
pub(crate) type UnitTileFn = unsafe fn(blocks: usize, steps: usize, a: *const u8, b: *const u8, c: Tile);
type QuantizeRow = unsafe fn(*const f32, usize, Scaling, f32, *const u16, *mut f32);
type RoundRow = unsafe fn(*const f32, usize, Scaling, *const u16, *mut i16);
type StageStrips = unsafe fn(*const f32, isize, usize, usize, *mut f32, usize, *mut i32);
type EncodeRows = unsafe fn(&[*const f32; 4], usize, &[*const u16; 4], &PanelCoding, &BlockPlace) -> bool;
type EncodeLines = unsafe fn(&LineRun, usize, &PanelCoding) -> bool;
type EncodeStrip = unsafe fn(*const f32, *const u16, *const i32, &PanelCoding, &[BlockPlace]) -> u32;

/// A tile kernel and the products it is exact for.
#[derive(Debug)]
pub(crate) struct TileKernel {
    pub(crate) correction: Correction,
    /// Whether sums stay exact: steps of a block, largest code of the left, width of the right operand.
    pub(crate) fits: fn(steps: usize, left_max: i32, right_bits: u8) -> bool,
    /// The function for tiles of a shape.
    pub(crate) of_shape: fn(TileShape) -> TileFn,
}

/// What a tile kernel is compiled for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileShape {
    /// Steps of a block.
    pub(crate) steps: usize,
    /// The first rows of a panel, up to 4. Lines and narrow tiles have 4.
    pub(crate) rows: usize,
    /// Whether the rows of A are lines, and not panels.
    pub(crate) lines: bool,
    /// Whether B panels have half the columns: one register.
    pub(crate) narrow: bool,
}

/// Kernels of a matrix unit; conditions as for the functions of the same names in [`super::generic::matrix_unit`].
#[derive(Debug)]
pub(crate) struct MatrixUnitKernels {
    /// Runs a task with the unit configured for blocks of so many steps.
    pub(crate) with: unsafe fn(steps: usize, task: &mut dyn FnMut()),
    pub(crate) lay_out_left: unsafe fn(blocks: usize, steps: usize, panels: &[*const u8; PANELS], out: *mut u8),
    pub(crate) lay_out_lines: unsafe fn(blocks: usize, steps: usize, lines: &[*const u8; SIDE], out: *mut u8),
    /// Of bytes, of nibbles.
    pub(crate) lay_out_right: [LayOutRight; 2],
    /// The function for blocks of this many steps.
    pub(crate) tile: fn(steps: usize) -> UnitTileFn,
    pub(crate) straight: StraightKernels,
    pub(crate) rows: RowsKernels,
    pub(crate) peak: unsafe fn(rounds: usize),
}
/// Conditions as for [`super::generic::relayout::panel_of_lines`].
pub(crate) type PanelOfLines =
    unsafe fn(lines: *const u8, row: usize, words: usize, out: *mut u8, block_bytes: usize, special: &mut [bool]);
type LayOutRight = unsafe fn(blocks: usize, steps: usize, offset: i32, panel: *const u8, out: *mut u8);

/// Kernels for rows of few columns; conditions as for the functions of the same names in
/// [`super::generic::unit_rows`].
#[derive(Debug)]
pub(crate) struct RowsKernels {
    pub(crate) lay_out_columns: LayOutColumns,
    pub(crate) rows: unsafe fn(groups: &[unit_rows::Group<'_>], of: &unit_rows::Products),
}
type LayOutColumns = unsafe fn(usize, usize, usize, i32, *const u8, usize, *mut u8);

/// Kernels for lines brought to one exponent; conditions as for the functions of the same names in
/// [`super::generic::aligned`].
#[derive(Debug)]
pub(crate) struct AlignedKernels {
    /// Fewest left panels for which laying both operands out pays.
    pub(crate) fewest_panels: usize,
    /// Runs a task that calls `tile`.
    pub(crate) with: unsafe fn(task: &mut dyn FnMut()),
    /// Of panels, of lines.
    pub(crate) lay_out_left: [AlignLeft; 2],
    /// Of bytes, of nibbles.
    pub(crate) lay_out_right: [AlignRight; 2],
    /// `rows` are those of C that matter.
    pub(crate) tile: unsafe fn(pieces: usize, a: *const u8, b: *const u8, bias: &[f32; SIDE], c: Tile, rows: usize),
}
type AlignLeft = unsafe fn(
    pieces: usize,
    blocks: usize,
    steps: usize,
    room: i32,
    rows: &[&[*const u8]],
    out: *mut u8,
) -> Option<u32>;
type AlignRight =
    unsafe fn(blocks: usize, steps: usize, offset: i32, room: i32, panel: *const u8, out: *mut u8) -> Option<u32>;

/// Kernels for small matrices; conditions as for the functions of the same names in [`super::generic::straight`].
#[derive(Debug)]
pub(crate) struct StraightKernels {
    /// Of a left, of a right operand; of lines that are contiguous, that lie side by side. Indexed by rounding.
    pub(crate) encode: [[[EncodeStraight; 4]; 2]; 2],
    pub(crate) product: unsafe fn(&straight::Sizes, a: *const u8, b: *const u8, c: *mut f32),
}
type EncodeStraight = unsafe fn(&straight::Lines, &PanelCoding, to: *mut u8) -> bool;

/// Kernels for convolutions of narrow groups; conditions as for the functions of the same names in
/// [`super::generic::narrow_groups`].
#[derive(Debug)]
pub(crate) struct NarrowKernels {
    /// Indexed by rounding.
    pub(crate) patches: [NarrowPatches; 4],
    pub(crate) encode_pixels: [unsafe fn(&narrow_groups::Pixels, &PanelCoding) -> bool; 4],
    pub(crate) zero_pixel: unsafe fn(to: *mut i32),
    /// For what went around the caches; nothing to a level whose registers are no cache lines.
    pub(crate) fence: unsafe fn(),
    pub(crate) multiply_pixels: unsafe fn(&narrow_groups::Meetings<'_>),
    pub(crate) encode_columns: [unsafe fn(&narrow_groups::Samples, &PanelCoding, to: *mut u8) -> bool; 4],
    /// Of groups of 1, 2, 4, 8 channels.
    pub(crate) sum_pixels: [unsafe fn(&narrow_groups::Sums<'_>, &mut [f32]); 4],
}
type NarrowPatches = unsafe fn(&narrow_groups::Patches<'_>, &PanelCoding, found: &mut [*const f32]) -> bool;

/// The kernels of a level. Conditions of the functions stand at the generic algorithms of the same names.
#[derive(Debug)]
pub struct Kernels {
    pub(crate) level: Level,
    /// Columns of a B panel: two registers. See [`Kernels::columns_for`].
    pub(crate) columns: usize,
    /// In order of preference; the last one fits everything the fast path admits.
    pub(crate) tiles: &'static [TileKernel],
    /// The same straight from nibbles.
    pub(crate) nibble_tiles: &'static [TileKernel],
    /// For tiles of 32 × 32 of lines brought to one exponent, where the level has the registers for it.
    pub(crate) aligned: Option<AlignedKernels>,
    /// For tiles of 32 × 32, where the level has a matrix unit: one that also has `aligned`.
    pub(crate) matrix_unit: Option<MatrixUnitKernels>,
    pub(crate) unpack_nibbles: unsafe fn(blocks: usize, steps: usize, b: *const u8, out: *mut u8),
    /// Of lines of 4-bit codes, of bytes.
    pub(crate) panel_of_lines: [PanelOfLines; 2],
    pub(crate) amax_row: unsafe fn(*const f32, usize) -> u32,
    /// Indexed by rounding.
    pub(crate) round_row_i16: [RoundRow; 4],
    pub(crate) quantize_row: [QuantizeRow; 4],
    pub(crate) stage_strips: StageStrips,
    pub(crate) encode_rows: [EncodeRows; 4],
    pub(crate) encode_lines: [EncodeLines; 4],
    pub(crate) encode_strip: [EncodeStrip; 4],
    pub(crate) narrow: NarrowKernels,
    pub(crate) fill_random: unsafe fn(Seed, Counters, *mut u16),
    pub(crate) fill_random_columns: unsafe fn(Seed, Counters, columns: usize, *mut u16),
    pub(crate) scale_row: unsafe fn(*const f32, *mut f32, usize, f32, *const f32),
    pub(crate) softmax_row: unsafe fn(*mut f32, usize),
    pub(crate) softmax_backward_row: unsafe fn(*const f32, *mut f32, usize, f32),
    pub(crate) drop_row: unsafe fn(*const f32, *mut f32, *const u16, usize, i32, f32),
    pub(crate) peak_pairs: unsafe fn(usize, i32) -> i32,
    pub(crate) peak_dot4: unsafe fn(usize, i32) -> i32,
    pub(crate) read_words: unsafe fn(*const i32, usize) -> i32,
}

impl Kernels {
    /// The kernels of `level`.
    ///
    /// # Panics
    /// If this CPU can't run the level; [`Level::request`] gives an error instead.
    #[must_use]
    pub fn of(level: Level) -> &'static Self {
        assert!(level.is_available(), "level {level} can't run on this CPU");
        match level {
            Level::Scalar => &scalar::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &avx2::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => &avx512vnni::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Level::Amx => &amx::KERNELS,
            #[cfg(not(target_arch = "x86_64"))]
            Level::Avx2 | Level::Avx512Vnni | Level::Amx => unreachable!(),
        }
    }

    /// The kernels of the widest level this CPU can run.
    #[must_use]
    pub fn best() -> &'static Self {
        Self::of(Level::best())
    }

    /// Columns of the B panels of an operand of so many lines that is not kept for all products: half, where these do.
    pub(crate) fn columns_for(&self, lines: usize) -> usize {
        if 2 * lines <= self.columns { self.columns / 2 } else { self.columns }
    }

    /// The level.
    #[must_use]
    pub fn level(&self) -> Level {
        self.level
    }
}

const DOT4: fn(usize, i32, u8) -> bool = |_, _, _| true;
const WIDE: fn(usize, i32, u8) -> bool = DOT4;
const SEGMENTS8: fn(usize, i32, u8) -> bool = |_, left_max, right_bits| segment_fits(8, left_max, right_bits);
const SEGMENTS2: fn(usize, i32, u8) -> bool = |_, left_max, right_bits| segment_fits(2, left_max, right_bits);

const fn segment_fits(steps: i64, left_max: i32, right_bits: u8) -> bool {
    2 * steps * ((1i64 << right_bits) - 1) * (left_max as i64) < 1 << 15
}

const HALVES: fn(usize, i32, u8) -> bool = |steps, left_max, right_bits| {
    let right_max = (1i64 << (right_bits - 1)) - 1;
    let (steps, left_max) = (steps as i64, i64::from(left_max));
    2 * steps * left_max * right_max < 1 << 15 && 2 * ((1i64 << right_bits) - 1) * left_max < 1 << 15
};

/// Compiles the generic algorithms for one token: typed shells, and the table that lists them.
macro_rules! kernels {
    // Inner rules: the attribute reaches each function as one token.
    (@tiles $make:expr, $attribute:tt, $($tile:ident)+) => {
        $(kernels!(@tile $make, $attribute, $tile);)+
    };
    (@tile $make:expr, $attribute:tt, $tile:ident) => {
        fn $tile(shape: TileShape) -> TileFn {
            #$attribute
            unsafe fn run<A: Left, const STEPS: usize, const ROWS: usize, const N: usize>(of: Operands, c: Tile) {
                unsafe { product::$tile::<_, A, STEPS, ROWS, N>($make, of, c) }
            }
            let TileShape { steps, rows, lines, narrow } = shape;
            debug_assert!(rows == PANEL_ROWS || !(lines || narrow));
            match (lines, narrow, steps, rows) {
                (false, false, 16, 1) => run::<Panel, 16, 1, 2>,
                (false, false, _, 1) => run::<Panel, 0, 1, 2>,
                (false, false, _, 2) => run::<Panel, 0, 2, 2>,
                (false, false, _, 3) => run::<Panel, 0, 3, 2>,
                (false, false, 16, _) => run::<Panel, 16, 4, 2>,
                (false, false, _, _) => run::<Panel, 0, 4, 2>,
                (false, true, 16, _) => run::<Panel, 16, 4, 1>,
                (false, true, _, _) => run::<Panel, 0, 4, 1>,
                (true, false, 16, _) => run::<Lines, 16, 4, 2>,
                (true, false, _, _) => run::<Lines, 0, 4, 2>,
                (true, true, 4, _) => run::<Lines, 4, 4, 1>,
                (true, true, _, _) => run::<Lines, 0, 4, 1>,
            }
        }
    };
    ($name:ident, $level:expr, $token:ty, $make:expr, [$($tile:ident $correction:ident $fits:ident),+],
     [$($nibbles:ident $nibbles_correction:ident $nibbles_fit:ident),+], $aligned:expr, $attribute:tt) => {
        pub(crate) mod $name {
            #![allow(clippy::undocumented_unsafe_blocks, reason = "shells: the conditions are those of the function called")]
            use super::*;
            use crate::arch::generic::product::{Left, PANEL_ROWS};
            use crate::arch::generic::{encode, philox, product, relayout, softmax};
            use crate::arch::simd::Simd;
            use crate::ceilings;

            pub(crate) static KERNELS: Kernels = TABLE;
            pub(crate) const TABLE: Kernels = Kernels {
                level: $level,
                columns: 2 * <$token>::LANES,
                tiles: &[$(TileKernel { correction: Correction::$correction, fits: $fits, of_shape: $tile }),+],
                nibble_tiles: &[
                    $(TileKernel { correction: Correction::$nibbles_correction, fits: $nibbles_fit, of_shape: $nibbles }),+
                ],
                aligned: $aligned,
                matrix_unit: None,
                unpack_nibbles,
                panel_of_lines: [panel_of_lines::<true>, panel_of_lines::<false>],
                amax_row,
                round_row_i16: [round_row_i16::<NEAREST_EVEN>, round_row_i16::<NEAREST_AWAY>, round_row_i16::<TOWARD_ZERO>, round_row_i16::<STOCHASTIC>],
                quantize_row: [quantize_row::<NEAREST_EVEN>, quantize_row::<NEAREST_AWAY>, quantize_row::<TOWARD_ZERO>, quantize_row::<STOCHASTIC>],
                stage_strips,
                encode_rows: [encode_rows::<NEAREST_EVEN>, encode_rows::<NEAREST_AWAY>, encode_rows::<TOWARD_ZERO>, encode_rows::<STOCHASTIC>],
                encode_lines: [encode_lines::<NEAREST_EVEN>, encode_lines::<NEAREST_AWAY>, encode_lines::<TOWARD_ZERO>, encode_lines::<STOCHASTIC>],
                encode_strip: [encode_strip::<NEAREST_EVEN>, encode_strip::<NEAREST_AWAY>, encode_strip::<TOWARD_ZERO>, encode_strip::<STOCHASTIC>],
                narrow: NarrowKernels {
                    patches: [narrow_patches::<NEAREST_EVEN>, narrow_patches::<NEAREST_AWAY>, narrow_patches::<TOWARD_ZERO>, narrow_patches::<STOCHASTIC>],
                    encode_pixels: [encode_pixels::<NEAREST_EVEN>, encode_pixels::<NEAREST_AWAY>, encode_pixels::<TOWARD_ZERO>, encode_pixels::<STOCHASTIC>],
                    zero_pixel,
                    fence,
                    multiply_pixels,
                    encode_columns: [encode_columns::<NEAREST_EVEN>, encode_columns::<NEAREST_AWAY>, encode_columns::<TOWARD_ZERO>, encode_columns::<STOCHASTIC>],
                    sum_pixels: [sum_pixels::<1>, sum_pixels::<2>, sum_pixels::<4>, sum_pixels::<8>],
                },
                fill_random,
                fill_random_columns,
                scale_row,
                softmax_row,
                softmax_backward_row,
                drop_row,
                peak_pairs,
                peak_dot4,
                read_words,
            };

            kernels!(@tiles $make, $attribute, $($tile)+ $($nibbles)+);
            #$attribute
            unsafe fn unpack_nibbles(blocks: usize, steps: usize, b: *const u8, out: *mut u8) {
                unsafe { product::unpack_nibbles($make, blocks, steps, b, out) }
            }
            #$attribute
            unsafe fn panel_of_lines<const NIBBLES: bool>(
                lines: *const u8, row: usize, words: usize, out: *mut u8, block_bytes: usize, special: &mut [bool],
            ) {
                unsafe { relayout::panel_of_lines::<_, NIBBLES>($make, lines, row, words, out, block_bytes, special) }
            }
            #$attribute
            unsafe fn amax_row(x: *const f32, n: usize) -> u32 {
                unsafe { encode::amax_row($make, x, n) }
            }
            #$attribute
            unsafe fn round_row_i16<const R: u8>(x: *const f32, n: usize, q: Scaling, r: *const u16, out: *mut i16) {
                unsafe { encode::round_row_i16::<_, R>($make, x, n, q, r, out) }
            }
            #$attribute
            unsafe fn quantize_row<const R: u8>(x: *const f32, n: usize, q: Scaling, scale: f32, r: *const u16, out: *mut f32) {
                unsafe { encode::quantize_row::<_, R>($make, x, n, q, scale, r, out) }
            }
            #$attribute
            unsafe fn stage_strips(
                x: *const f32, stride: isize, n: usize, lines: usize, staging: *mut f32, between: usize, amax: *mut i32,
            ) {
                unsafe { encode::stage_strips($make, x, stride, n, lines, staging, between, amax) }
            }
            #$attribute
            unsafe fn encode_rows<const R: u8>(
                x: &[*const f32; 4], n: usize, random: &[*const u16; 4], coding: &PanelCoding, place: &BlockPlace,
            ) -> bool {
                unsafe { encode::encode_rows::<_, R>($make, x, n, random, coding, place) }
            }
            #$attribute
            unsafe fn encode_lines<const R: u8>(of: &LineRun, n: usize, coding: &PanelCoding) -> bool {
                unsafe { encode::encode_lines::<_, R>($make, of, n, coding) }
            }
            #$attribute
            unsafe fn encode_strip<const R: u8>(
                staging: *const f32, random: *const u16, amax: *const i32, coding: &PanelCoding, places: &[BlockPlace],
            ) -> u32 {
                unsafe { encode::encode_strip::<_, R>($make, staging, random, amax, coding, places) }
            }
            #$attribute
            unsafe fn narrow_patches<const R: u8>(
                of: &narrow_groups::Patches<'_>, coding: &PanelCoding, found: &mut [*const f32],
            ) -> bool {
                unsafe { narrow_groups::patches::<_, R>($make, of, coding, found) }
            }
            #$attribute
            unsafe fn encode_pixels<const R: u8>(of: &narrow_groups::Pixels, coding: &PanelCoding) -> bool {
                unsafe { narrow_groups::encode_pixels::<_, R>($make, of, coding) }
            }
            #$attribute
            unsafe fn zero_pixel(to: *mut i32) {
                unsafe { narrow_groups::zero_pixel($make, to) }
            }
            #$attribute
            unsafe fn fence() {
                unsafe { $make.fence() }
            }
            #$attribute
            unsafe fn multiply_pixels(of: &narrow_groups::Meetings<'_>) {
                unsafe { narrow_groups::multiply_pixels($make, of) }
            }
            #$attribute
            unsafe fn encode_columns<const R: u8>(of: &narrow_groups::Samples, coding: &PanelCoding, to: *mut u8) -> bool {
                unsafe { narrow_groups::encode_columns::<_, R>($make, of, coding, to) }
            }
            #$attribute
            unsafe fn sum_pixels<const C: usize>(of: &narrow_groups::Sums<'_>, sums: &mut [f32]) {
                unsafe { narrow_groups::sum_pixels::<_, C>($make, of, sums) }
            }
            #$attribute
            unsafe fn fill_random(seed: Seed, counters: Counters, out: *mut u16) {
                unsafe { philox::fill_random($make, seed, counters, out) }
            }
            #$attribute
            unsafe fn fill_random_columns(seed: Seed, counters: Counters, columns: usize, out: *mut u16) {
                unsafe { philox::fill_random_columns($make, seed, counters, columns, out) }
            }
            #$attribute
            unsafe fn scale_row(x: *const f32, out: *mut f32, n: usize, scale: f32, mask: *const f32) {
                unsafe { softmax::scale_row($make, x, out, n, scale, mask) }
            }
            #$attribute
            unsafe fn softmax_row(row: *mut f32, n: usize) {
                unsafe { softmax::softmax_row($make, row, n) }
            }
            #$attribute
            unsafe fn softmax_backward_row(p: *const f32, grad: *mut f32, n: usize, scale: f32) {
                unsafe { softmax::softmax_backward_row($make, p, grad, n, scale) }
            }
            #$attribute
            unsafe fn drop_row(x: *const f32, out: *mut f32, random: *const u16, n: usize, dropped: i32, factor: f32) {
                unsafe { softmax::drop_row($make, x, out, random, n, dropped, factor) }
            }
            #$attribute
            unsafe fn peak_pairs(rounds: usize, seed: i32) -> i32 {
                unsafe { ceilings::peak_pairs($make, rounds, seed) }
            }
            #$attribute
            unsafe fn peak_dot4(rounds: usize, seed: i32) -> i32 {
                unsafe { ceilings::peak_dot4($make, rounds, seed) }
            }
            #$attribute
            unsafe fn read_words(p: *const i32, n: usize) -> i32 {
                unsafe { ceilings::read_words($make, p, n) }
            }
        }
    };
}

kernels!(scalar, Level::Scalar, crate::arch::scalar::Scalar<8>, crate::arch::scalar::Scalar::<8>, [tile_dot4 Total DOT4],
    [nibbles_dot4 Total DOT4], None, [inline]);
#[cfg(target_arch = "x86_64")]
kernels!(
    avx2, Level::Avx2, crate::arch::x86_64::avx2::Avx2, crate::arch::x86_64::avx2::Avx2::assume(),
    [tile_halves Halves HALVES, tile_segments8 Total SEGMENTS8, tile_segments2 Total SEGMENTS2, tile_wide Wide WIDE],
    [nibbles_halves Halves HALVES], None, [target_feature(enable = "avx2,fma")]
);
#[cfg(target_arch = "x86_64")]
kernels!(
    avx512vnni, Level::Avx512Vnni, crate::arch::x86_64::avx512vnni::Avx512Vnni,
    crate::arch::x86_64::avx512vnni::Avx512Vnni::assume(),
    [tile_dot4 Total DOT4], [nibbles_dot4 Total DOT4], Some(aligned512::KERNELS), [target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
);

/// [`straight::encode`] of a side, by rounding.
macro_rules! straight_roundings {
    ($left:literal, $across:literal) => {
        [
            straight_encode::<NEAREST_EVEN, $left, $across>,
            straight_encode::<NEAREST_AWAY, $left, $across>,
            straight_encode::<TOWARD_ZERO, $left, $across>,
            straight_encode::<STOCHASTIC, $left, $across>,
        ]
    };
}

/// Compiles those for lines brought to one exponent, and a tile for right codes that are raised or not.
macro_rules! aligned {
    ($name:ident, $make:expr, $raised:literal, $tile:path, $fewest:literal, $attribute:tt) => {
        pub(crate) mod $name {
            #![allow(clippy::undocumented_unsafe_blocks, reason = "shells: the conditions are those of the function called")]
            use super::*;
            use crate::arch::generic::product::Left;
            use crate::arch::simd::Simd;

            pub(crate) const KERNELS: AlignedKernels = AlignedKernels {
                fewest_panels: $fewest,
                with,
                lay_out_left: [lay_out_left::<Panel>, lay_out_left::<Lines>],
                lay_out_right: [lay_out_right::<false>, lay_out_right::<true>],
                tile,
            };
            unsafe fn with(task: &mut dyn FnMut()) {
                task();
                unsafe { $make.fence() }
            }
            #$attribute
            unsafe fn lay_out_left<L: Left>(
                pieces: usize, blocks: usize, steps: usize, room: i32, rows: &[&[*const u8]], out: *mut u8,
            ) -> Option<u32> {
                unsafe { aligned::lay_out_left::<_, L>($make, pieces, blocks, steps, room, rows, out) }
            }
            #$attribute
            unsafe fn lay_out_right<const NIBBLES: bool>(
                blocks: usize, steps: usize, offset: i32, room: i32, panel: *const u8, out: *mut u8,
            ) -> Option<u32> {
                unsafe { aligned::lay_out_right::<_, NIBBLES, $raised>($make, blocks, steps, offset, room, panel, out) }
            }
            #$attribute
            unsafe fn tile(pieces: usize, a: *const u8, b: *const u8, bias: &[f32; SIDE], c: Tile, rows: usize) {
                unsafe { $tile($make, pieces, a, b, bias, (c, rows)) }
            }
        }
    };
}

/// Compiles the algorithms of a matrix unit for one token, and adds them to a level's table.
macro_rules! matrix_unit {
    ($name:ident, $level:expr, $base:ident, $aligned:ident, $token:ty, $make:expr, $attribute:tt) => {
        pub(crate) mod $name {
            #![allow(clippy::undocumented_unsafe_blocks, reason = "shells: the conditions are those of the function called")]
            use super::*;
            use crate::arch::generic::aligned::PIECE;
            use crate::arch::generic::matrix_unit::MatrixUnit;
            use crate::arch::simd::Simd;

            pub(crate) static KERNELS: Kernels = Kernels {
                level: $level,
                aligned: Some(AlignedKernels { with: with_whole_pieces, ..$aligned::KERNELS }),
                matrix_unit: Some(MatrixUnitKernels {
                    with,
                    lay_out_left,
                    lay_out_lines,
                    lay_out_right: [lay_out_right::<false>, lay_out_right::<true>],
                    tile: |steps| if steps == 16 { tile::<16> } else { tile::<0> },
                    straight: StraightKernels {
                        encode: [
                            [straight_roundings!(true, false), straight_roundings!(true, true)],
                            [straight_roundings!(false, false), straight_roundings!(false, true)],
                        ],
                        product: straight_product,
                    },
                    rows: RowsKernels { lay_out_columns, rows },
                    peak,
                }),
                ..$base::TABLE
            };

            unsafe fn with(steps: usize, task: &mut dyn FnMut()) {
                /// Restores also when the task panics.
                struct Restored(Option<<$token as MatrixUnit>::Before>);
                impl Drop for Restored {
                    fn drop(&mut self) {
                        self.0.take().into_iter().for_each(|before| unsafe { $make.restore(before) });
                        unsafe { $make.fence() }
                    }
                }
                let _restored = Restored(Some(unsafe { matrix_unit::configure($make, steps) }));
                task();
            }
            unsafe fn with_whole_pieces(task: &mut dyn FnMut()) {
                unsafe { with(PIECE, task) }
            }
            unsafe fn peak(rounds: usize) {
                unsafe { with(PIECE, &mut || matrix_unit::peak($make, rounds)) }
            }
            #$attribute
            unsafe fn lay_out_left(blocks: usize, steps: usize, panels: &[*const u8; PANELS], out: *mut u8) {
                unsafe { matrix_unit::lay_out_left($make, blocks, steps, panels, out) }
            }
            #$attribute
            unsafe fn lay_out_lines(blocks: usize, steps: usize, lines: &[*const u8; SIDE], out: *mut u8) {
                unsafe { matrix_unit::lay_out_lines($make, blocks, steps, lines, out) }
            }
            #$attribute
            unsafe fn lay_out_right<const NIBBLES: bool>(blocks: usize, steps: usize, offset: i32, panel: *const u8, out: *mut u8) {
                unsafe { matrix_unit::lay_out_right::<_, NIBBLES>($make, blocks, steps, offset, panel, out) }
            }
            #$attribute
            unsafe fn lay_out_columns(
                blocks: usize, steps: usize, width: usize, offset: i32, panel: *const u8, column: usize, out: *mut u8,
            ) {
                unsafe { unit_rows::lay_out_columns($make, blocks, steps, width, offset, panel, column, out) }
            }
            #$attribute
            unsafe fn rows(groups: &[unit_rows::Group<'_>], of: &unit_rows::Products) {
                unsafe { unit_rows::rows($make, groups, of) }
            }
            #$attribute
            unsafe fn straight_encode<const R: u8, const LEFT: bool, const ACROSS: bool>(
                of: &straight::Lines, coding: &PanelCoding, to: *mut u8,
            ) -> bool {
                unsafe { straight::encode::<_, R, LEFT, ACROSS>($make, of, coding, to) }
            }
            #$attribute
            unsafe fn straight_product(sizes: &straight::Sizes, a: *const u8, b: *const u8, c: *mut f32) {
                unsafe { straight::product($make, sizes, a, b, c) }
            }
            #$attribute
            unsafe fn tile<const STEPS: usize>(blocks: usize, steps: usize, a: *const u8, b: *const u8, c: Tile) {
                unsafe { matrix_unit::tile::<_, STEPS>($make, blocks, steps, a, b, c) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
aligned!(
    aligned512,
    crate::arch::x86_64::avx512vnni::Avx512Vnni::assume(),
    true,
    aligned::tile,
    3,
    [target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
);
#[cfg(target_arch = "x86_64")]
aligned!(
    aligned_amx,
    crate::arch::x86_64::avx512vnni::Avx512Vnni::assume(),
    false,
    matrix_unit::aligned_tile,
    3,
    [target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
);
#[cfg(target_arch = "x86_64")]
matrix_unit!(
    amx,
    Level::Amx,
    avx512vnni,
    aligned_amx,
    crate::arch::x86_64::avx512vnni::Avx512Vnni,
    crate::arch::x86_64::avx512vnni::Avx512Vnni::assume(),
    [target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
);

/// The generic kernels of the AVX2 and the AVX-512 level on plain arrays: what those levels compute, minus their
/// intrinsics, on every machine.
#[cfg(any(test, feature = "testing"))]
pub mod models {
    use super::*;
    kernels!(lanes8, Level::Scalar, crate::arch::scalar::Scalar<8>, crate::arch::scalar::Scalar::<8>,
        [tile_halves Halves HALVES, tile_segments8 Total SEGMENTS8, tile_segments2 Total SEGMENTS2, tile_wide Wide WIDE],
        [nibbles_halves Halves HALVES], None, [inline]);
    kernels!(lanes16, Level::Scalar, crate::arch::scalar::Scalar<16>, crate::arch::scalar::Scalar::<16>,
        [tile_dot4 Total DOT4], [nibbles_dot4 Total DOT4], Some(aligned16::KERNELS), [inline]);
    aligned!(aligned16, crate::arch::scalar::Scalar::<16>, true, aligned::tile, 3, [inline]);
    aligned!(aligned_unit, crate::arch::scalar::Scalar::<16>, false, matrix_unit::aligned_tile, 3, [inline]);

    matrix_unit!(
        lanes16_and_unit,
        Level::Scalar,
        lanes16,
        aligned_unit,
        crate::arch::scalar::Scalar<16>,
        crate::arch::scalar::Scalar::<16>,
        [inline]
    );

    /// The model of the AVX2 level.
    #[must_use]
    pub fn avx2() -> &'static Kernels {
        &lanes8::KERNELS
    }
    /// The model of the AVX-512 VNNI level.
    #[must_use]
    pub fn avx512vnni() -> &'static Kernels {
        &lanes16::KERNELS
    }
    /// The model of the AMX level.
    #[must_use]
    pub fn amx() -> &'static Kernels {
        &lanes16_and_unit::KERNELS
    }
}
