//! The innermost tiles of a product: up to 4 rows × 2 registers of columns, over all blocks of the reduction.
//!
//! # The exponent rides in the accumulator
//! On levels whose dot products add to 32 bits (scalar, AVX-512). An accumulator starts as the bits of the float 1.5·2^23·2^(ea+eb). Integer sums then count in units of that float's
//! last place: after the block its bits, read as f32, are (1.5·2^23 + D)·2^(ea+eb) exactly, as long as |D| < 2^22 and
//! the exponent stays normal (−149 ≤ ea + eb ≤ 104). Subtracting 1.5·2^23·2^(ea+eb) is exact; adding to C is the one
//! rounding of the contract.
//!
//! # Panels
//! A block of `n` elements takes `steps` = ⌈n / 4⌉ steps; missing elements are zero codes.
//! ```text
//! A block   [steps][4 rows][4 k] i8 codes, then i32 correction[4], i32 ea[4] << 23
//!   wide    [steps][4 rows][k 0, 2, 1, 3] i16 codes, then the same
//!   a line  of one row: [steps][4 k] codes, i32 correction, i32 ea << 23; four of them anywhere stand for a panel
//! B block   [steps][columns][4 k] u8 codes + OFF, then i32 0x4B400000 + (eb[columns] << 23)
//!   nibbles [⌈steps / 2⌉][columns][4 k] u8: codes + OFF of step 2t in the low half, of step 2t + 1 in the high half;
//!           then u8 exponent bytes c[columns]
//! ```
//! OFF = 2^(m_b − 1) makes B unsigned for the multipliers. Its share of a sum, OFF · Σa, is taken off by `correction`:
//! with [`Correction::Total`] that is (ea << 23) − OFF · Σa; with [`Correction::Halves`] two i16, −OFF times Σa over
//! k mod 4 in {0, 1} and in {2, 3}, modulo 2^16.
//!
//! # Ceilings
//! AVX-512 VNNI: two vpdpbusd of 64 products a cycle. AVX2 with 16-bit sums: one vpmaddubsw and one vpaddw for 32
//! products, so four vector ports end at two pairs a cycle (Zen 3 reaches 85 % of that even without loads); a block
//! costs 4 more operations for each of the tile's registers: widening and adding halves, conversion, scale, fused
//! multiply-add.

use crate::arch::simd::Simd;
use crate::format::EXPONENT_OFFSET;

/// Rows of an A panel.
pub(crate) const PANEL_ROWS: usize = 4;
/// Bits of 1.5·2^23.
pub(crate) const RIDER: i32 = 0x4B40_0000;

/// A tile of C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile {
    /// Its first element.
    pub(crate) c: *mut f32,
    /// Elements from a row to the next.
    pub(crate) stride: usize,
    /// Whether sums start from +0.0, whatever C holds.
    pub(crate) fresh: bool,
    /// Whether a kernel that can writes it to memory around the caches.
    pub(crate) around: bool,
}

/// What a fresh tile starts from.
static ZEROS: [f32; 32] = [0.0; 32];

impl Tile {
    /// First element and row stride of what the first block adds to.
    #[inline(always)]
    fn start(&self) -> (*const f32, usize) {
        if self.fresh { (ZEROS.as_ptr(), 0) } else { (self.c, self.stride) }
    }
}

/// What a tile kernel reads as its A panel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Correction {
    Total,
    Halves,
    /// Total, and 16-bit codes.
    Wide,
}

/// Bytes of a block of an A panel.
#[inline(always)]
pub(crate) const fn a_block_bytes(steps: usize, wide: bool) -> usize {
    (if wide { 32 } else { 16 }) * steps + 32
}
/// Bytes of a block of a B panel with `columns` columns.
#[inline(always)]
pub(crate) const fn b_block_bytes(steps: usize, columns: usize) -> usize {
    4 * columns * (steps + 1)
}
/// Bytes of a block of a B panel of nibbles.
#[inline(always)]
pub(crate) const fn nibble_block_bytes(steps: usize, columns: usize) -> usize {
    columns * (4 * steps.div_ceil(2) + 1)
}

/// Four rows of A over a piece of the reduction. A line of a row holds what a panel holds of it: codes, correction, rider
/// of each block, one after the other.
pub(crate) trait Left: Copy {
    /// Pointers that say where they lie.
    const POINTERS: usize;
    /// # Safety
    /// `starts` is valid for reading that many.
    unsafe fn new(starts: *const *const u8) -> Self;
    /// The `size` bytes of row `row` that begin at byte `offset` of its line.
    fn at(self, row: usize, offset: usize, size: usize) -> *const u8;
    /// The same rows so many bytes of a line on.
    fn advance(self, bytes: usize) -> Self;
}

/// Rows of a panel, side by side.
#[derive(Clone, Copy)]
pub(crate) struct Panel(*const u8);

impl Left for Panel {
    const POINTERS: usize = 1;
    #[inline(always)]
    unsafe fn new(starts: *const *const u8) -> Self {
        // SAFETY: the caller's word.
        Self(unsafe { *starts })
    }
    #[inline(always)]
    fn at(self, row: usize, offset: usize, size: usize) -> *const u8 {
        self.0.wrapping_add(PANEL_ROWS * offset + size * row)
    }
    #[inline(always)]
    fn advance(self, bytes: usize) -> Self {
        Self(self.0.wrapping_add(PANEL_ROWS * bytes))
    }
}

/// Rows anywhere, line by line.
#[derive(Clone, Copy)]
pub(crate) struct Lines([*const u8; PANEL_ROWS]);

impl Left for Lines {
    const POINTERS: usize = PANEL_ROWS;
    #[inline(always)]
    unsafe fn new(starts: *const *const u8) -> Self {
        // SAFETY: the caller's word.
        Self(unsafe { *starts.cast() })
    }
    #[inline(always)]
    fn at(self, row: usize, offset: usize, _size: usize) -> *const u8 {
        self.0[row].wrapping_add(offset)
    }
    #[inline(always)]
    fn advance(self, bytes: usize) -> Self {
        Self(self.0.map(|line| line.wrapping_add(bytes)))
    }
}

/// What a kernel multiplies: rows of A in pieces, and a B panel that holds the pieces one after the other.
#[derive(Clone, Copy)]
pub(crate) struct Operands {
    pub(crate) pieces: usize,
    /// [`Left::POINTERS`] of each piece.
    pub(crate) a: *const *const u8,
    /// Blocks of a piece.
    pub(crate) blocks: usize,
    /// Steps of a block.
    pub(crate) steps: usize,
    pub(crate) b: *const u8,
}

/// Bytes of a line of a block of A.
#[inline(always)]
const fn line_bytes(steps: usize, wide: bool) -> usize {
    a_block_bytes(steps, wide) / PANEL_ROWS
}

type Sums<S, const ROWS: usize, const N: usize> = [[<S as Simd>::V; N]; ROWS];

/// A word of a panel in all lanes. (Not a closure: those do not inherit the caller's instructions.)
///
/// # Safety
/// `p` is valid for reading four bytes.
#[inline(always)]
unsafe fn word<S: Simd>(s: S, p: *const u8) -> S::V {
    // SAFETY: the caller vouches for the bytes.
    s.splat(unsafe { p.cast::<i32>().read_unaligned() })
}

/// A step of a B panel: one or two registers of columns.
///
/// # Safety
/// `p` is valid for reading N registers.
#[inline(always)]
pub(crate) unsafe fn columns<S: Simd, const N: usize>(s: S, p: *const u8) -> [S::V; N] {
    let mut columns = [s.splat(0); N];
    for (v, column) in columns.iter_mut().enumerate() {
        // SAFETY: the caller vouches for the bytes.
        *column = unsafe { s.load(p.add(4 * S::LANES * v).cast()) };
    }
    columns
}

/// Riders of the columns of a block of nibbles.
///
/// # Safety
/// `p` is valid for reading `N * LANES` bytes.
#[inline(always)]
pub(crate) unsafe fn nibble_riders<S: Simd, const N: usize>(s: S, p: *const u8) -> [S::V; N] {
    let base = s.splat(RIDER.wrapping_sub(EXPONENT_OFFSET << 23));
    let mut riders = [base; N];
    for (v, rider) in riders.iter_mut().enumerate() {
        // SAFETY: the caller vouches for the bytes.
        *rider = s.add(s.shl::<23>(unsafe { s.load_u8(p.add(S::LANES * v)) }), base);
    }
    riders
}

/// The low and the high nibbles of bytes: two steps of a B panel.
#[inline(always)]
pub(crate) fn nibbles<S: Simd, const N: usize>(s: S, x: [S::V; N]) -> [[S::V; N]; 2] {
    let low = s.splat(0x0F0F_0F0F);
    let mut steps = [x; 2];
    for v in 0..N {
        steps[0][v] = s.and(x[v], low);
        steps[1][v] = s.and(s.sar::<4>(x[v]), low);
    }
    steps
}

/// Sums of 16-bit halves start as −OFF · Σa, which lies at byte `ends` of the lines.
///
/// # Safety
/// `a` is valid for reading four bytes there.
#[inline(always)]
unsafe fn start_halves<S: Simd, A: Left, const ROWS: usize, const N: usize>(
    s: S,
    a: A,
    ends: usize,
) -> Sums<S, ROWS, N> {
    let mut acc = [[s.splat(0); N]; ROWS];
    for (i, acc) in acc.iter_mut().enumerate() {
        // SAFETY: i < ROWS.
        *acc = [unsafe { word(s, a.at(i, ends, 4)) }; N];
    }
    acc
}

/// Sums of 32 bits start as the rider minus OFF · Σa, which is at byte `ends` of the lines.
///
/// # Safety
/// `a` is valid for reading four bytes there.
#[inline(always)]
unsafe fn start_total<S: Simd, A: Left, const ROWS: usize, const N: usize>(
    s: S,
    eb: [S::V; N],
    a: A,
    ends: usize,
) -> Sums<S, ROWS, N> {
    let mut acc = [[s.splat(0); N]; ROWS];
    for (i, acc) in acc.iter_mut().enumerate() {
        // SAFETY: i < ROWS.
        let start = unsafe { word(s, a.at(i, ends, 4)) };
        for (acc, eb) in acc.iter_mut().zip(eb) {
            *acc = s.add(eb, start);
        }
    }
    acc
}

/// Sums of 32 bits start as −OFF · Σa.
///
/// # Safety
/// `a` is valid for reading eight bytes at byte `ends` of the lines.
#[inline(always)]
unsafe fn start_plain<S: Simd, A: Left, const ROWS: usize, const N: usize>(
    s: S,
    a: A,
    ends: usize,
) -> Sums<S, ROWS, N> {
    let mut acc = [[s.splat(0); N]; ROWS];
    for (i, acc) in acc.iter_mut().enumerate() {
        // SAFETY: i < ROWS.
        *acc = [unsafe { s.sub(word(s, a.at(i, ends, 4)), word(s, a.at(i, ends + 4, 4))) }; N];
    }
    acc
}

/// One step in 16-bit halves. Additions follow their multiplications at a distance of four: next to them they would
/// compete for the multipliers' ports (9 % on Zen 3; left to itself, the compiler puts them there).
///
/// # Safety
/// `a` is valid for reading step `t`.
#[inline(always)]
unsafe fn step_halves<S: Simd, A: Left, const ROWS: usize, const N: usize>(
    s: S,
    acc: &mut Sums<S, ROWS, N>,
    x: [S::V; N],
    a: A,
    t: usize,
) {
    const LAG: usize = 4;
    let mut product = [s.splat(0); 2 * PANEL_ROWS];
    let mut w = product[0];
    for j in 0..N * ROWS + LAG {
        if j >= LAG {
            let sum = &mut acc[(j - LAG) / N][(j - LAG) % N];
            *sum = s.add_i16(*sum, product[j - LAG]);
        }
        if j < N * ROWS {
            if j % N == 0 {
                // SAFETY: j / N < ROWS.
                w = s.in_order(unsafe { word(s, a.at(j / N, 4 * t, 4)) });
            }
            product[j] = s.in_order(s.mul_pairs(x[j % N], w));
        }
    }
}

/// One step in four-byte dot products.
///
/// # Safety
/// `a` is valid for reading step `t`.
#[inline(always)]
unsafe fn step_dot4<S: Simd, A: Left, const ROWS: usize, const N: usize>(
    s: S,
    acc: &mut Sums<S, ROWS, N>,
    x: [S::V; N],
    a: A,
    t: usize,
) {
    for (i, acc) in acc.iter_mut().enumerate() {
        // SAFETY: i < ROWS.
        let w = unsafe { word(s, a.at(i, 4 * t, 4)) };
        for (acc, x) in acc.iter_mut().zip(x) {
            *acc = s.dot4(*acc, x, w);
        }
    }
}

/// Turns a block's totals, riders included, into floats and adds them to the tile; the rows' riders are at byte `riders`
/// of their lines.
///
/// # Safety
/// As for [`finish`].
#[inline(always)]
unsafe fn finish_riding<S: Simd, A: Left, const ROWS: usize, const N: usize>(
    s: S,
    total: &Sums<S, ROWS, N>,
    eb: [S::V; N],
    (a, riders): (A, usize),
    from: (*const f32, usize),
    c: &Tile,
) {
    for v in 0..N {
        for (i, total) in total.iter().enumerate() {
            // SAFETY: i < ROWS, v < N.
            unsafe {
                let zero = s.add(eb[v], word(s, a.at(i, riders, 4)));
                let sum = s.load(from.0.add(i * from.1 + v * S::LANES).cast());
                let sum = s.add_f32(sum, s.sub_f32(total[v], zero));
                s.store(c.c.add(i * c.stride + v * S::LANES).cast(), sum);
            }
        }
    }
}

/// Adds a block's sums D, in words or in halves still to be added, to the tile: C = fma(D, 2^(ea+eb), C). The product is
/// exact, so that this is the one rounding as well; 2^(ea+eb) is normal in the fast range.
///
/// # Safety
/// `a` is valid for reading four bytes at byte `riders` of its lines, `from` and `c` for reading and writing ROWS rows of
/// N LANES elements.
#[inline(always)]
unsafe fn finish<S: Simd, A: Left, const ROWS: usize, const N: usize, const HALVES: bool>(
    s: S,
    sums: &Sums<S, ROWS, N>,
    eb: [S::V; N],
    (a, riders): (A, usize),
    from: (*const f32, usize),
    c: &Tile,
) {
    // From the bits of 1.5·2^23 to those of 1.
    let one = s.splat(0x3F80_0000 - RIDER);
    for v in 0..N {
        // In order: else the compiler adds `one` to each of the riders.
        let eb = s.in_order(s.add(eb[v], one));
        for (i, sums) in sums.iter().enumerate() {
            // SAFETY: i < ROWS, v < N.
            unsafe {
                let scale = s.add(eb, word(s, a.at(i, riders, 4)));
                let sum = s.load(from.0.add(i * from.1 + v * S::LANES).cast());
                let sum = s.mul_add_f32(s.to_f32(if HALVES { s.sum_halves(sums[v]) } else { sums[v] }), scale, sum);
                s.store(c.c.add(i * c.stride + v * S::LANES).cast(), sum);
            }
        }
    }
}

/// C tile += A · B panel by four-byte dot products.
///
/// # Safety
/// - `of.a` is valid for reading the pointers of `of.pieces` pieces, and these for reading the blocks of ROWS ≤ 4 rows;
/// - `of.b` is valid for reading the blocks of all pieces of a B panel of N LANES columns;
/// - `c` is valid for reading and writing ROWS rows of N LANES elements; there are blocks.
#[inline(always)]
pub(crate) unsafe fn tile_dot4<S: Simd, A: Left, const STEPS: usize, const ROWS: usize, const N: usize>(
    s: S,
    of: Operands,
    c: Tile,
) {
    let steps = if STEPS == 0 { of.steps } else { STEPS };
    let width = N * S::LANES;
    // SAFETY: all offsets are inside the blocks and the tile that the caller vouches for.
    unsafe {
        let mut sum = [[s.splat(0); N]; ROWS];
        for (i, row) in sum.iter_mut().enumerate() {
            let (from, stride) = c.start();
            *row = columns(s, from.add(i * stride).cast());
        }
        let mut b = of.b;
        for piece in 0..of.pieces {
            let mut a = A::new(of.a.add(piece * A::POINTERS));
            for _ in 0..of.blocks {
                let eb = columns(s, b.add(4 * width * steps));
                let mut acc = start_total::<S, A, ROWS, N>(s, eb, a, 4 * steps);
                for t in 0..steps {
                    step_dot4::<S, A, ROWS, N>(s, &mut acc, columns(s, b.add(4 * t * width)), a, t);
                }
                for v in 0..N {
                    for i in 0..ROWS {
                        let zero = s.add(eb[v], word(s, a.at(i, 4 * steps + 4, 4)));
                        sum[i][v] = s.add_f32(sum[i][v], s.sub_f32(acc[i][v], zero));
                    }
                }
                a = a.advance(line_bytes(steps, false));
                b = b.wrapping_add(b_block_bytes(steps, width));
            }
        }
        for (i, row) in sum.iter().enumerate() {
            for (v, x) in row.iter().enumerate() {
                s.store(c.c.add(i * c.stride + v * S::LANES).cast(), *x);
            }
        }
    }
}

/// C tile += A · B panel with sums in 16-bit halves: one vpmaddubsw and one vpaddw for eight products a lane. The
/// C tile stays in memory.
///
/// Exact while a half's signed sum fits an i16 (2 · steps · Qa · Qb < 2^15; the offset's share cancels modulo 2^16)
/// and no pair of products saturates (2 · (2^m_b − 1) · Qa < 2^15).
///
/// # Safety
/// As for [`tile_dot4`].
#[inline(always)]
pub(crate) unsafe fn tile_halves<S: Simd, A: Left, const STEPS: usize, const ROWS: usize, const N: usize>(
    s: S,
    of: Operands,
    c: Tile,
) {
    let steps = if STEPS == 0 { of.steps } else { STEPS };
    let width = N * S::LANES;
    // SAFETY: all offsets are inside the blocks and the tile that the caller vouches for.
    unsafe {
        let mut from = c.start();
        let mut b = of.b;
        for piece in 0..of.pieces {
            let mut a = A::new(of.a.add(piece * A::POINTERS));
            for _ in 0..of.blocks {
                let mut acc = start_halves::<S, A, ROWS, N>(s, a, 4 * steps);
                for t in 0..steps {
                    step_halves::<S, A, ROWS, N>(s, &mut acc, columns(s, b.add(4 * t * width)), a, t);
                }
                let eb = columns(s, b.add(4 * width * steps));
                finish::<S, A, ROWS, N, true>(s, &acc, eb, (a, 4 * steps + 4), from, &c);
                from = (c.c, c.stride);
                a = a.advance(line_bytes(steps, false));
                b = b.wrapping_add(b_block_bytes(steps, width));
            }
        }
    }
}

/// The same in segments of SEGMENT steps, after which the halves go into sums of 32 bits.
///
/// Exact while a segment's unsigned sum fits an i16: 2 · SEGMENT · (2^m_b − 1) · Qa < 2^15.
///
/// # Safety
/// As for [`tile_dot4`].
#[inline(always)]
unsafe fn tile_segments<
    S: Simd,
    A: Left,
    const STEPS: usize,
    const ROWS: usize,
    const N: usize,
    const SEGMENT: usize,
>(
    s: S,
    of: Operands,
    c: Tile,
) {
    let steps = if STEPS == 0 { of.steps } else { STEPS };
    let width = N * S::LANES;
    // SAFETY: all offsets are inside the blocks and the tile that the caller vouches for.
    unsafe {
        let mut from = c.start();
        let mut b = of.b;
        for piece in 0..of.pieces {
            let mut a = A::new(of.a.add(piece * A::POINTERS));
            for _ in 0..of.blocks {
                let mut acc = start_plain::<S, A, ROWS, N>(s, a, 4 * steps);
                let mut done = 0;
                while done < steps {
                    let mut halves = [[s.splat(0); N]; ROWS];
                    for t in done..(done + SEGMENT).min(steps) {
                        step_halves::<S, A, ROWS, N>(s, &mut halves, columns(s, b.add(4 * t * width)), a, t);
                    }
                    for (acc, halves) in acc.iter_mut().zip(&halves) {
                        for (acc, halves) in acc.iter_mut().zip(halves) {
                            *acc = s.add(*acc, s.sum_halves(*halves));
                        }
                    }
                    done += SEGMENT;
                }
                let eb = columns(s, b.add(4 * width * steps));
                finish::<S, A, ROWS, N, false>(s, &acc, eb, (a, 4 * steps + 4), from, &c);
                from = (c.c, c.stride);
                a = a.advance(line_bytes(steps, false));
                b = b.wrapping_add(b_block_bytes(steps, width));
            }
        }
    }
}

/// [`tile_segments`] of eight steps.
///
/// # Safety
/// As for [`tile_dot4`].
#[inline(always)]
pub(crate) unsafe fn tile_segments8<S: Simd, A: Left, const STEPS: usize, const ROWS: usize, const N: usize>(
    s: S,
    of: Operands,
    c: Tile,
) {
    // SAFETY: the caller's word.
    unsafe { tile_segments::<S, A, STEPS, ROWS, N, 8>(s, of, c) }
}

/// [`tile_segments`] of two steps.
///
/// # Safety
/// As for [`tile_dot4`].
#[inline(always)]
pub(crate) unsafe fn tile_segments2<S: Simd, A: Left, const STEPS: usize, const ROWS: usize, const N: usize>(
    s: S,
    of: Operands,
    c: Tile,
) {
    // SAFETY: the caller's word.
    unsafe { tile_segments::<S, A, STEPS, ROWS, N, 2>(s, of, c) }
}

/// C tile += A · B panel for every width up to 8: bytes of B, widened here, times 16-bit codes of A.
///
/// # Safety
/// As for [`tile_dot4`], with wide rows of A.
#[inline(always)]
pub(crate) unsafe fn tile_wide<S: Simd, A: Left, const STEPS: usize, const ROWS: usize, const N: usize>(
    s: S,
    of: Operands,
    c: Tile,
) {
    const LAG: usize = 3;
    let steps = if STEPS == 0 { of.steps } else { STEPS };
    let width = N * S::LANES;
    let low = s.splat(0x00FF_00FF);
    // SAFETY: all offsets are inside the blocks and the tile that the caller vouches for.
    unsafe {
        let mut from = c.start();
        let mut b = of.b;
        for piece in 0..of.pieces {
            let mut a = A::new(of.a.add(piece * A::POINTERS));
            for _ in 0..of.blocks {
                let mut acc = start_plain::<S, A, ROWS, N>(s, a, 8 * steps);
                for t in 0..steps {
                    let x: [S::V; N] = columns(s, b.add(4 * t * width));
                    for odd in 0..2 {
                        let mut half = x;
                        for x in &mut half {
                            *x = if odd == 0 { s.and(*x, low) } else { s.high_bytes(*x) };
                        }
                        let mut product = [s.splat(0); 2 * PANEL_ROWS];
                        let mut w = product[0];
                        for j in 0..N * ROWS + LAG {
                            if j >= LAG {
                                let sum = &mut acc[(j - LAG) / N][(j - LAG) % N];
                                *sum = s.add(*sum, product[j - LAG]);
                            }
                            if j < N * ROWS {
                                if j % N == 0 {
                                    w = s.in_order(word(s, a.at(j / N, 8 * t, 8).wrapping_add(4 * odd)));
                                }
                                product[j] = s.in_order(s.mul_halves(half[j % N], w));
                            }
                        }
                    }
                }
                let eb = columns(s, b.add(4 * width * steps));
                finish::<S, A, ROWS, N, false>(s, &acc, eb, (a, 8 * steps + 4), from, &c);
                from = (c.c, c.stride);
                a = a.advance(line_bytes(steps, true));
                b = b.wrapping_add(b_block_bytes(steps, width));
            }
        }
    }
}

/// [`tile_halves`] straight from nibbles.
///
/// # Safety
/// As for [`tile_dot4`], with a B panel of nibbles.
#[inline(always)]
pub(crate) unsafe fn nibbles_halves<S: Simd, A: Left, const STEPS: usize, const ROWS: usize, const N: usize>(
    s: S,
    of: Operands,
    c: Tile,
) {
    let steps = if STEPS == 0 { of.steps } else { STEPS };
    let width = N * S::LANES;
    // SAFETY: all offsets are inside the blocks and the tile that the caller vouches for.
    unsafe {
        let mut from = c.start();
        let mut b = of.b;
        for piece in 0..of.pieces {
            let mut a = A::new(of.a.add(piece * A::POINTERS));
            for _ in 0..of.blocks {
                let mut acc = start_halves::<S, A, ROWS, N>(s, a, 4 * steps);
                for t in 0..steps / 2 {
                    let [even, odd] = nibbles(s, columns(s, b.add(4 * t * width)));
                    step_halves::<S, A, ROWS, N>(s, &mut acc, even, a, 2 * t);
                    step_halves::<S, A, ROWS, N>(s, &mut acc, odd, a, 2 * t + 1);
                }
                if steps % 2 == 1 {
                    let [even, _] = nibbles(s, columns(s, b.add(4 * (steps / 2) * width)));
                    step_halves::<S, A, ROWS, N>(s, &mut acc, even, a, steps - 1);
                }
                let eb = nibble_riders(s, b.add(4 * width * steps.div_ceil(2)));
                finish::<S, A, ROWS, N, true>(s, &acc, eb, (a, 4 * steps + 4), from, &c);
                from = (c.c, c.stride);
                a = a.advance(line_bytes(steps, false));
                b = b.wrapping_add(nibble_block_bytes(steps, width));
            }
        }
    }
}

/// Bytes ahead of what is read, so that one row by a matrix in the last-level cache does not wait at each page.
const AHEAD: usize = 3 << 10;

/// [`tile_dot4`] straight from nibbles.
///
/// # Safety
/// As for [`tile_dot4`], with a B panel of nibbles.
#[inline(always)]
pub(crate) unsafe fn nibbles_dot4<S: Simd, A: Left, const STEPS: usize, const ROWS: usize, const N: usize>(
    s: S,
    of: Operands,
    c: Tile,
) {
    let steps = if STEPS == 0 { of.steps } else { STEPS };
    let width = N * S::LANES;
    // SAFETY: all offsets are inside the blocks and the tile that the caller vouches for.
    unsafe {
        let mut from = c.start();
        let mut b = of.b;
        for piece in 0..of.pieces {
            let mut a = A::new(of.a.add(piece * A::POINTERS));
            for _ in 0..of.blocks {
                let eb = nibble_riders(s, b.add(4 * width * steps.div_ceil(2)));
                let mut acc = start_total::<S, A, ROWS, N>(s, eb, a, 4 * steps);
                for t in 0..steps / 2 {
                    for v in 0..N {
                        s.prefetch(b.wrapping_add(4 * (t * width + S::LANES * v) + AHEAD).cast());
                    }
                    let [even, odd] = nibbles(s, columns(s, b.add(4 * t * width)));
                    step_dot4::<S, A, ROWS, N>(s, &mut acc, even, a, 2 * t);
                    step_dot4::<S, A, ROWS, N>(s, &mut acc, odd, a, 2 * t + 1);
                }
                if steps % 2 == 1 {
                    let [even, _] = nibbles(s, columns(s, b.add(4 * (steps / 2) * width)));
                    step_dot4::<S, A, ROWS, N>(s, &mut acc, even, a, steps - 1);
                }
                finish_riding(s, &acc, eb, (a, 4 * steps + 4), from, &c);
                from = (c.c, c.stride);
                a = a.advance(line_bytes(steps, false));
                b = b.wrapping_add(nibble_block_bytes(steps, width));
            }
        }
    }
}

/// A B panel of bytes from one of nibbles.
///
/// # Safety
/// `b` is valid for reading `blocks` blocks of nibbles of 2 LANES columns, `out` for writing as many of bytes.
#[inline(always)]
pub(crate) unsafe fn unpack_nibbles<S: Simd>(s: S, blocks: usize, steps: usize, b: *const u8, out: *mut u8) {
    let width = 2 * S::LANES;
    // SAFETY: all offsets are inside the blocks.
    unsafe {
        for block in 0..blocks {
            let b = b.add(block * nibble_block_bytes(steps, width));
            let out = out.add(block * b_block_bytes(steps, width));
            for t in 0..steps {
                let x = nibbles::<S, 2>(s, columns(s, b.add(4 * (t / 2) * width)))[t % 2];
                s.store(out.add(4 * t * width).cast(), x[0]);
                s.store(out.add(4 * (t * width + S::LANES)).cast(), x[1]);
            }
            let eb: [S::V; 2] = nibble_riders(s, b.add(4 * width * steps.div_ceil(2)));
            s.store(out.add(4 * steps * width).cast(), eb[0]);
            s.store(out.add(4 * (steps * width + S::LANES)).cast(), eb[1]);
        }
    }
}
