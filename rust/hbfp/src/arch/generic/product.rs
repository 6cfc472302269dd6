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

type Sums<S, const ROWS: usize> = [[<S as Simd>::V; 2]; ROWS];

/// A word of a panel in all lanes. (Not a closure: those do not inherit the caller's instructions.)
///
/// # Safety
/// `p` is valid for reading four bytes.
#[inline(always)]
unsafe fn word<S: Simd>(s: S, p: *const u8) -> S::V {
    // SAFETY: the caller vouches for the bytes.
    s.splat(unsafe { p.cast::<i32>().read_unaligned() })
}

/// A step of a B panel: two registers of columns.
///
/// # Safety
/// `p` is valid for reading two registers.
#[inline(always)]
pub(crate) unsafe fn columns<S: Simd>(s: S, p: *const u8) -> [S::V; 2] {
    // SAFETY: the caller vouches for the bytes.
    unsafe { [s.load(p.cast()), s.load(p.add(4 * S::LANES).cast())] }
}

/// Riders of the columns of a block of nibbles.
///
/// # Safety
/// `p` is valid for reading `2 * LANES` bytes.
#[inline(always)]
pub(crate) unsafe fn nibble_riders<S: Simd>(s: S, p: *const u8) -> [S::V; 2] {
    let base = s.splat(RIDER.wrapping_sub(EXPONENT_OFFSET << 23));
    // SAFETY: the caller vouches for the bytes.
    let c = unsafe { [s.load_u8(p), s.load_u8(p.add(S::LANES))] };
    [s.add(s.shl::<23>(c[0]), base), s.add(s.shl::<23>(c[1]), base)]
}

/// The low and the high nibbles of bytes of two registers: two steps of a B panel.
#[inline(always)]
pub(crate) fn nibbles<S: Simd>(s: S, x: [S::V; 2]) -> [[S::V; 2]; 2] {
    let low = s.splat(0x0F0F_0F0F);
    [[s.and(x[0], low), s.and(x[1], low)], [s.and(s.sar::<4>(x[0]), low), s.and(s.sar::<4>(x[1]), low)]]
}

/// Sums of 16-bit halves start as −OFF · Σa.
///
/// # Safety
/// `ends` is valid for reading 4 · ROWS bytes.
#[inline(always)]
unsafe fn start_halves<S: Simd, const ROWS: usize>(s: S, ends: *const u8) -> Sums<S, ROWS> {
    let mut acc = [[s.splat(0); 2]; ROWS];
    for (i, acc) in acc.iter_mut().enumerate() {
        // SAFETY: i < ROWS.
        *acc = [unsafe { word(s, ends.add(4 * i)) }; 2];
    }
    acc
}

/// Sums of 32 bits start as the rider minus OFF · Σa.
///
/// # Safety
/// `ends` is valid for reading 4 · ROWS bytes.
#[inline(always)]
unsafe fn start_total<S: Simd, const ROWS: usize>(s: S, eb: [S::V; 2], ends: *const u8) -> Sums<S, ROWS> {
    let mut acc = [[s.splat(0); 2]; ROWS];
    for (i, acc) in acc.iter_mut().enumerate() {
        // SAFETY: i < ROWS.
        let start = unsafe { word(s, ends.add(4 * i)) };
        *acc = [s.add(eb[0], start), s.add(eb[1], start)];
    }
    acc
}

/// Sums of 32 bits start as −OFF · Σa.
///
/// # Safety
/// `ends` is valid for reading 16 + 4 · ROWS bytes.
#[inline(always)]
unsafe fn start_plain<S: Simd, const ROWS: usize>(s: S, ends: *const u8) -> Sums<S, ROWS> {
    let mut acc = [[s.splat(0); 2]; ROWS];
    for (i, acc) in acc.iter_mut().enumerate() {
        // SAFETY: i < ROWS.
        *acc = [unsafe { s.sub(word(s, ends.add(4 * i)), word(s, ends.add(16 + 4 * i))) }; 2];
    }
    acc
}

/// One step in 16-bit halves. Additions follow their multiplications at a distance of four: next to them they would
/// compete for the multipliers' ports (9 % on Zen 3; left to itself, the compiler puts them there).
///
/// # Safety
/// `a` is valid for reading 4 · ROWS bytes.
#[inline(always)]
unsafe fn step_halves<S: Simd, const ROWS: usize>(s: S, acc: &mut Sums<S, ROWS>, x: [S::V; 2], a: *const u8) {
    const LAG: usize = 4;
    let mut product = [s.splat(0); 2 * PANEL_ROWS];
    let mut w = product[0];
    for j in 0..2 * ROWS + LAG {
        if j >= LAG {
            let sum = &mut acc[(j - LAG) / 2][j % 2];
            *sum = s.add_i16(*sum, product[j - LAG]);
        }
        if j < 2 * ROWS {
            if j % 2 == 0 {
                // SAFETY: j / 2 < ROWS.
                w = s.in_order(unsafe { word(s, a.add(2 * j)) });
            }
            product[j] = s.in_order(s.mul_pairs(x[j % 2], w));
        }
    }
}

/// One step in four-byte dot products.
///
/// # Safety
/// `a` is valid for reading 4 · ROWS bytes.
#[inline(always)]
unsafe fn step_dot4<S: Simd, const ROWS: usize>(s: S, acc: &mut Sums<S, ROWS>, x: [S::V; 2], a: *const u8) {
    for (i, acc) in acc.iter_mut().enumerate() {
        // SAFETY: i < ROWS.
        let w = unsafe { word(s, a.add(4 * i)) };
        *acc = [s.dot4(acc[0], x[0], w), s.dot4(acc[1], x[1], w)];
    }
}

/// Turns a block's totals, riders included, into floats and adds them to the tile.
///
/// # Safety
/// As for [`finish`].
#[inline(always)]
unsafe fn finish_riding<S: Simd, const ROWS: usize>(
    s: S,
    total: &Sums<S, ROWS>,
    eb: [S::V; 2],
    riders: *const u8,
    from: (*const f32, usize),
    c: &Tile,
) {
    for v in 0..2 {
        for (i, total) in total.iter().enumerate() {
            // SAFETY: i < ROWS, v < 2.
            unsafe {
                let zero = s.add(eb[v], word(s, riders.add(4 * i)));
                let sum = s.load(from.0.add(i * from.1 + v * S::LANES).cast());
                let sum = s.add_f32(sum, s.sub_f32(total[v], zero));
                s.store(c.c.add(i * c.stride + v * S::LANES).cast(), sum);
            }
        }
    }
}

/// Adds a block's sums D, in words or in halves still to be added, to the tile: C = fma(D, 2^(ea+eb), C). The product is exact, so that this is the
/// one rounding as well; 2^(ea+eb) is normal in the fast range.
///
/// # Safety
/// `riders` is valid for reading 4 · ROWS bytes, `from` and `c` for reading and writing ROWS rows of 2 LANES elements.
#[inline(always)]
unsafe fn finish<S: Simd, const ROWS: usize, const HALVES: bool>(
    s: S,
    sums: &Sums<S, ROWS>,
    eb: [S::V; 2],
    riders: *const u8,
    from: (*const f32, usize),
    c: &Tile,
) {
    // From the bits of 1.5·2^23 to those of 1.
    let one = s.splat(0x3F80_0000 - RIDER);
    for v in 0..2 {
        // In order: else the compiler adds `one` to each of the riders.
        let eb = s.in_order(s.add(eb[v], one));
        for (i, sums) in sums.iter().enumerate() {
            // SAFETY: i < ROWS, v < 2.
            unsafe {
                let scale = s.add(eb, word(s, riders.add(4 * i)));
                let sum = s.load(from.0.add(i * from.1 + v * S::LANES).cast());
                let sum = s.mul_add_f32(s.to_f32(if HALVES { s.sum_halves(sums[v]) } else { sums[v] }), scale, sum);
                s.store(c.c.add(i * c.stride + v * S::LANES).cast(), sum);
            }
        }
    }
}

/// C tile += A panel · B panel by four-byte dot products.
///
/// # Safety
/// - `a` is valid for reading `blocks` blocks of an A panel, `b` of a B panel of 2 LANES columns;
/// - `c` is valid for reading and writing ROWS ≤ 4 rows of 2 LANES elements; blocks > 0.
#[inline(always)]
pub(crate) unsafe fn tile_dot4<S: Simd, const STEPS: usize, const ROWS: usize>(
    s: S,
    blocks: usize,
    steps: usize,
    a: *const u8,
    b: *const u8,
    c: Tile,
) {
    let steps = if STEPS == 0 { steps } else { STEPS };
    let width = 2 * S::LANES;
    // SAFETY: all offsets are inside the blocks and the tile that the caller vouches for.
    unsafe {
        let mut sum = [[s.splat(0); 2]; ROWS];
        for (i, row) in sum.iter_mut().enumerate() {
            let (from, stride) = c.start();
            *row = columns(s, from.add(i * stride).cast());
        }
        for block in 0..blocks {
            let a = a.add(block * a_block_bytes(steps, false));
            let b = b.add(block * b_block_bytes(steps, width));
            let ends = a.add(16 * steps);
            let eb = columns(s, b.add(4 * width * steps));
            let mut acc = start_total::<S, ROWS>(s, eb, ends);
            for t in 0..steps {
                step_dot4::<S, ROWS>(s, &mut acc, columns(s, b.add(4 * t * width)), a.add(16 * t));
            }
            for v in 0..2 {
                for i in 0..ROWS {
                    let zero = s.add(eb[v], word(s, ends.add(16 + 4 * i)));
                    sum[i][v] = s.add_f32(sum[i][v], s.sub_f32(acc[i][v], zero));
                }
            }
        }
        for (i, row) in sum.iter().enumerate() {
            for (v, x) in row.iter().enumerate() {
                s.store(c.c.add(i * c.stride + v * S::LANES).cast(), *x);
            }
        }
    }
}

/// C tile += A panel · B panel with sums in 16-bit halves: one vpmaddubsw and one vpaddw for eight products a lane. The
/// C tile stays in memory.
///
/// Exact while a half's signed sum fits an i16 (2 · steps · Qa · Qb < 2^15; the offset's share cancels modulo 2^16)
/// and no pair of products saturates (2 · (2^m_b − 1) · Qa < 2^15).
///
/// # Safety
/// As for [`tile_dot4`].
#[inline(always)]
pub(crate) unsafe fn tile_halves<S: Simd, const STEPS: usize, const ROWS: usize>(
    s: S,
    blocks: usize,
    steps: usize,
    a: *const u8,
    b: *const u8,
    c: Tile,
) {
    let steps = if STEPS == 0 { steps } else { STEPS };
    let width = 2 * S::LANES;
    // SAFETY: all offsets are inside the blocks and the tile that the caller vouches for.
    unsafe {
        let mut from = c.start();
        for block in 0..blocks {
            let a = a.add(block * a_block_bytes(steps, false));
            let b = b.add(block * b_block_bytes(steps, width));
            let ends = a.add(16 * steps);
            let mut acc = start_halves::<S, ROWS>(s, ends);
            for t in 0..steps {
                step_halves::<S, ROWS>(s, &mut acc, columns(s, b.add(4 * t * width)), a.add(16 * t));
            }
            finish::<S, ROWS, true>(s, &acc, columns(s, b.add(4 * width * steps)), ends.add(16), from, &c);
            from = (c.c, c.stride);
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
unsafe fn tile_segments<S: Simd, const STEPS: usize, const ROWS: usize, const SEGMENT: usize>(
    s: S,
    blocks: usize,
    steps: usize,
    a: *const u8,
    b: *const u8,
    c: Tile,
) {
    let steps = if STEPS == 0 { steps } else { STEPS };
    let width = 2 * S::LANES;
    // SAFETY: all offsets are inside the blocks and the tile that the caller vouches for.
    unsafe {
        let mut from = c.start();
        for block in 0..blocks {
            let a = a.add(block * a_block_bytes(steps, false));
            let b = b.add(block * b_block_bytes(steps, width));
            let ends = a.add(16 * steps);
            let mut acc = start_plain::<S, ROWS>(s, ends);
            let mut done = 0;
            while done < steps {
                let mut halves = [[s.splat(0); 2]; ROWS];
                for t in done..(done + SEGMENT).min(steps) {
                    step_halves::<S, ROWS>(s, &mut halves, columns(s, b.add(4 * t * width)), a.add(16 * t));
                }
                for (acc, halves) in acc.iter_mut().zip(&halves) {
                    *acc = [s.add(acc[0], s.sum_halves(halves[0])), s.add(acc[1], s.sum_halves(halves[1]))];
                }
                done += SEGMENT;
            }
            finish::<S, ROWS, false>(s, &acc, columns(s, b.add(4 * width * steps)), ends.add(16), from, &c);
            from = (c.c, c.stride);
        }
    }
}

/// [`tile_segments`] of eight steps.
///
/// # Safety
/// As for [`tile_dot4`].
#[inline(always)]
pub(crate) unsafe fn tile_segments8<S: Simd, const STEPS: usize, const ROWS: usize>(
    s: S,
    blocks: usize,
    steps: usize,
    a: *const u8,
    b: *const u8,
    c: Tile,
) {
    // SAFETY: the caller's word.
    unsafe { tile_segments::<S, STEPS, ROWS, 8>(s, blocks, steps, a, b, c) }
}

/// [`tile_segments`] of two steps.
///
/// # Safety
/// As for [`tile_dot4`].
#[inline(always)]
pub(crate) unsafe fn tile_segments2<S: Simd, const STEPS: usize, const ROWS: usize>(
    s: S,
    blocks: usize,
    steps: usize,
    a: *const u8,
    b: *const u8,
    c: Tile,
) {
    // SAFETY: the caller's word.
    unsafe { tile_segments::<S, STEPS, ROWS, 2>(s, blocks, steps, a, b, c) }
}

/// C tile += A panel · B panel for every width up to 8: bytes of B, widened here, times 16-bit codes of a wide A panel.
///
/// # Safety
/// As for [`tile_dot4`], with a wide A panel.
#[inline(always)]
pub(crate) unsafe fn tile_wide<S: Simd, const STEPS: usize, const ROWS: usize>(
    s: S,
    blocks: usize,
    steps: usize,
    a: *const u8,
    b: *const u8,
    c: Tile,
) {
    const LAG: usize = 3;
    let steps = if STEPS == 0 { steps } else { STEPS };
    let width = 2 * S::LANES;
    let low = s.splat(0x00FF_00FF);
    // SAFETY: all offsets are inside the blocks and the tile that the caller vouches for.
    unsafe {
        let mut from = c.start();
        for block in 0..blocks {
            let a = a.add(block * a_block_bytes(steps, true));
            let b = b.add(block * b_block_bytes(steps, width));
            let ends = a.add(32 * steps);
            let mut acc = start_plain::<S, ROWS>(s, ends);
            for t in 0..steps {
                let x = columns(s, b.add(4 * t * width));
                for odd in 0..2 {
                    let x = match odd {
                        0 => [s.and(x[0], low), s.and(x[1], low)],
                        _ => [s.high_bytes(x[0]), s.high_bytes(x[1])],
                    };
                    let mut product = [s.splat(0); 2 * PANEL_ROWS];
                    let mut w = product[0];
                    for j in 0..2 * ROWS + LAG {
                        if j >= LAG {
                            let sum = &mut acc[(j - LAG) / 2][(j - LAG) % 2];
                            *sum = s.add(*sum, product[j - LAG]);
                        }
                        if j < 2 * ROWS {
                            if j % 2 == 0 {
                                w = s.in_order(word(s, a.add(32 * t + 4 * j + 4 * odd)));
                            }
                            product[j] = s.in_order(s.mul_halves(x[j % 2], w));
                        }
                    }
                }
            }
            finish::<S, ROWS, false>(s, &acc, columns(s, b.add(4 * width * steps)), ends.add(16), from, &c);
            from = (c.c, c.stride);
        }
    }
}

/// [`tile_halves`] straight from nibbles.
///
/// # Safety
/// As for [`tile_dot4`], with a B panel of nibbles.
#[inline(always)]
pub(crate) unsafe fn nibbles_halves<S: Simd, const STEPS: usize, const ROWS: usize>(
    s: S,
    blocks: usize,
    steps: usize,
    a: *const u8,
    b: *const u8,
    c: Tile,
) {
    let steps = if STEPS == 0 { steps } else { STEPS };
    let width = 2 * S::LANES;
    // SAFETY: all offsets are inside the blocks and the tile that the caller vouches for.
    unsafe {
        let mut from = c.start();
        for block in 0..blocks {
            let a = a.add(block * a_block_bytes(steps, false));
            let b = b.add(block * nibble_block_bytes(steps, width));
            let ends = a.add(16 * steps);
            let mut acc = start_halves::<S, ROWS>(s, ends);
            for t in 0..steps / 2 {
                let [even, odd] = nibbles(s, columns(s, b.add(4 * t * width)));
                step_halves::<S, ROWS>(s, &mut acc, even, a.add(32 * t));
                step_halves::<S, ROWS>(s, &mut acc, odd, a.add(32 * t + 16));
            }
            if steps % 2 == 1 {
                let [even, _] = nibbles(s, columns(s, b.add(4 * (steps / 2) * width)));
                step_halves::<S, ROWS>(s, &mut acc, even, a.add(16 * (steps - 1)));
            }
            let eb = nibble_riders(s, b.add(4 * width * steps.div_ceil(2)));
            finish::<S, ROWS, true>(s, &acc, eb, ends.add(16), from, &c);
            from = (c.c, c.stride);
        }
    }
}

/// [`tile_dot4`] straight from nibbles.
///
/// # Safety
/// As for [`tile_dot4`], with a B panel of nibbles.
#[inline(always)]
pub(crate) unsafe fn nibbles_dot4<S: Simd, const STEPS: usize, const ROWS: usize>(
    s: S,
    blocks: usize,
    steps: usize,
    a: *const u8,
    b: *const u8,
    c: Tile,
) {
    let steps = if STEPS == 0 { steps } else { STEPS };
    let width = 2 * S::LANES;
    // SAFETY: all offsets are inside the blocks and the tile that the caller vouches for.
    unsafe {
        let mut from = c.start();
        for block in 0..blocks {
            let a = a.add(block * a_block_bytes(steps, false));
            let b = b.add(block * nibble_block_bytes(steps, width));
            let ends = a.add(16 * steps);
            let eb = nibble_riders(s, b.add(4 * width * steps.div_ceil(2)));
            let mut acc = start_total::<S, ROWS>(s, eb, ends);
            for t in 0..steps / 2 {
                let [even, odd] = nibbles(s, columns(s, b.add(4 * t * width)));
                step_dot4::<S, ROWS>(s, &mut acc, even, a.add(32 * t));
                step_dot4::<S, ROWS>(s, &mut acc, odd, a.add(32 * t + 16));
            }
            if steps % 2 == 1 {
                let [even, _] = nibbles(s, columns(s, b.add(4 * (steps / 2) * width)));
                step_dot4::<S, ROWS>(s, &mut acc, even, a.add(16 * (steps - 1)));
            }
            finish_riding(s, &acc, eb, ends.add(16), from, &c);
            from = (c.c, c.stride);
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
                let x = nibbles(s, columns(s, b.add(4 * (t / 2) * width)))[t % 2];
                s.store(out.add(4 * t * width).cast(), x[0]);
                s.store(out.add(4 * (t * width + S::LANES)).cast(), x[1]);
            }
            let eb = nibble_riders(s, b.add(4 * width * steps.div_ceil(2)));
            s.store(out.add(4 * steps * width).cast(), eb[0]);
            s.store(out.add(4 * (steps * width + S::LANES)).cast(), eb[1]);
        }
    }
}
