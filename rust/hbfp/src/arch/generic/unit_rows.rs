//! Sixteen rows by sixteen columns on a matrix unit, straight from encoded lines that lie at one distance: for products of
//! few columns, where nothing that is laid out anew would be used often enough to pay.
//!
//! The unit works on one group of rows while vector instructions scale the sums of an earlier one and add them to C, which
//! stays in registers for the whole reduction.
//!
//! # Layout
//! ```text
//! a row   lines of [4 · steps] i8 codes, i32 correction, i32 ea << 23; the unit needs no correction
//! right   for each product [steps][16 columns][4 k] i8 codes, then f32 2^eb[16]
//! ```

use super::matrix_unit::{HALF, MatrixUnit};
use super::product::{RIDER, b_block_bytes};
use std::mem::MaybeUninit;

/// Rows of a group, and columns.
pub(crate) const ROWS: usize = HALF;
/// Products by which adding up is behind the unit, which stores sums four products late.
const BEHIND: usize = 6;
/// Products whose sums are in memory at once.
const KEPT: usize = 8;

/// Sixteen rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group<'a> {
    /// The first row's line.
    pub(crate) line: *const u8,
    /// Bytes from there to the block of each product.
    pub(crate) offsets: &'a [usize],
    /// The first element of the first row of C.
    pub(crate) c: *mut f32,
}

/// What rows are multiplied by.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Products {
    pub(crate) steps: usize,
    /// The right operand, product after product.
    pub(crate) right: *const u8,
    /// Bytes from a row's line to the next one's.
    pub(crate) stride: usize,
    /// Elements from a row of C to the next.
    pub(crate) c_stride: usize,
    /// Whether sums start from +0.0, whatever C holds.
    pub(crate) fresh: bool,
    /// Whether C, which begins on cache lines and so do its rows, is written to memory around the caches.
    pub(crate) around: bool,
}

/// Bytes of a product's right operand.
pub(crate) const fn right_bytes(steps: usize) -> usize {
    4 * ROWS * (steps + 1)
}

/// Lays out sixteen columns, from `column` on, of `blocks` blocks of a panel of `width`, raised by `offset`.
///
/// # Safety
/// `panel` is valid for reading its blocks, `out` for writing `blocks` times [`right_bytes`].
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "a rectangle of a panel, and where it goes")]
pub(crate) unsafe fn lay_out_columns<S: MatrixUnit>(
    s: S,
    blocks: usize,
    steps: usize,
    width: usize,
    offset: i32,
    panel: *const u8,
    column: usize,
    out: *mut u8,
) {
    const BYTES: i32 = 0x0101_0101;
    const { assert!(S::LANES == ROWS) };
    // As for the unit's panels: no byte of the sum passes 255, and 128 off it is a change of the highest bit.
    let (raise, sign) = (s.splat(BYTES * (128 - offset)), s.splat(BYTES << 7));
    let one = s.splat(0x3F80_0000 - RIDER);
    for block in 0..blocks {
        // SAFETY: all offsets are inside the blocks that the caller vouches for.
        unsafe {
            let from = panel.add(block * b_block_bytes(steps, width) + 4 * column);
            let to = out.add(block * right_bytes(steps));
            for t in 0..steps {
                let x = s.load(from.add(4 * width * t).cast());
                s.store(to.add(4 * ROWS * t).cast(), s.xor(s.add(x, raise), sign));
            }
            s.store(to.add(4 * ROWS * steps).cast(), s.add(s.load(from.add(4 * width * steps).cast()), one));
        }
    }
}

#[repr(align(64))]
#[allow(dead_code, reason = "memory for sums, used through a pointer")]
struct Sums([[i32; ROWS * ROWS]; KEPT]);

/// What the unit does next.
struct Ahead<'a> {
    groups: &'a [Group<'a>],
    of: &'a Products,
    /// Products of all groups, and how many of them are begun.
    all: usize,
    begun: usize,
    /// The next product, and its group.
    group: usize,
    product: usize,
    sums: *mut i32,
}

impl Ahead<'_> {
    /// Where the sums of a product go.
    #[inline(always)]
    fn place(&self, product: usize) -> *mut i32 {
        self.sums.wrapping_add(ROWS * ROWS * (product % KEPT))
    }

    /// Begins the next product, if there is one, in the register that held an earlier one's sums, which are stored before.
    ///
    /// # Safety
    /// As for [`rows`].
    #[inline(always)]
    unsafe fn step<S: MatrixUnit>(&mut self, s: S) {
        // SAFETY: the caller's word.
        unsafe {
            match self.begun % 4 {
                0 => self.begin::<S, 0, 4, 6>(s),
                1 => self.begin::<S, 3, 5, 7>(s),
                2 => self.begin::<S, 1, 4, 7>(s),
                _ => self.begin::<S, 2, 5, 6>(s),
            }
        }
    }

    /// # Safety
    /// As for [`rows`].
    #[inline(always)]
    unsafe fn begin<S: MatrixUnit, const T: usize, const LEFT: usize, const RIGHT: usize>(&mut self, s: S) {
        // SAFETY: the caller's word.
        unsafe {
            if self.begun >= 4 && self.begun - 4 < self.all {
                s.store_sums::<T>(self.place(self.begun - 4));
            }
            if self.begun < self.all {
                let Group { line, offsets, .. } = self.groups.get_unchecked(self.group);
                s.clear::<T>();
                s.fill::<LEFT>(line.add(*offsets.get_unchecked(self.product)), self.of.stride);
                s.fill::<RIGHT>(self.of.right.add(self.product * right_bytes(self.of.steps)), 4 * ROWS);
                s.multiply::<T, LEFT, RIGHT>();
                self.product += 1;
                if self.product == offsets.len() {
                    (self.group, self.product) = (self.group + 1, 0);
                }
            }
            self.begun += 1;
        }
    }
}

/// C of all groups, or +0.0, + Σ over the products of rows · right operand, in order.
///
/// # Safety
/// - every line is valid for reading a block of `steps` steps at each of its group's offsets, none of which needs the general
///   product; all groups have as many, at least one;
/// - `right` is valid for reading as many blocks;
/// - `c` of each group is valid for reading and writing sixteen rows of sixteen elements;
/// - the calling thread's unit is configured for pieces of `steps` ≤ 16 steps.
#[inline(always)]
pub(crate) unsafe fn rows<S: MatrixUnit>(s: S, groups: &[Group<'_>], of: &Products) {
    const { assert!(S::LANES == ROWS) };
    let mut sums = MaybeUninit::<Sums>::uninit();
    let sums = sums.as_mut_ptr().cast::<i32>();
    let all = groups.iter().map(|group| group.offsets.len()).sum();
    let mut ahead = Ahead { groups, of, all, begun: 0, group: 0, product: 0, sums };
    let mut done = 0;
    // SAFETY: all offsets are inside what the caller vouches for; a product's sums are stored four products after it is begun,
    // read six after, and overwritten twelve after.
    unsafe {
        for _ in 0..BEHIND {
            ahead.step(s);
        }
        for &Group { line, offsets, c: to } in groups {
            let mut c = [s.splat(0); ROWS];
            if !of.fresh {
                for (row, c) in c.iter_mut().enumerate() {
                    *c = s.load(to.add(row * of.c_stride).cast());
                }
            }
            for (product, &offset) in offsets.iter().enumerate() {
                ahead.step(s);
                let sums = ahead.place(done);
                done += 1;
                let eb = s.load(of.right.add(product * right_bytes(of.steps) + 4 * ROWS * of.steps).cast());
                let rider = line.add(offset + 4 * (of.steps + 1));
                for (row, c) in c.iter_mut().enumerate() {
                    let ea = rider.add(row * of.stride).cast::<i32>().read_unaligned();
                    let scale = s.add(eb, s.splat(ea));
                    *c = s.mul_add_f32(s.to_f32(s.load(sums.add(ROWS * row))), scale, *c);
                }
            }
            for (row, c) in c.iter().enumerate() {
                let to = to.add(row * of.c_stride).cast();
                if of.around { s.store_around(to, *c) } else { s.store(to, *c) }
            }
        }
    }
}
