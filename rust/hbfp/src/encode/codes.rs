//! Codes of a whole operand, one i16 each: the form that every format can take, and the general product reads.
#![allow(unsafe_code, reason = "calls of kernels, and tasks that write disjoint lines")]

use super::blocks::{Part, RoundingMode, Scratch, load_lines};
use super::{Context, per_worker};
use crate::arch::generic::encode::{ROW_PADDING, STRIP, Scaling};
use crate::error::{Error, Result};
use crate::format::{BlockFormat, BlockShape, EXPONENT_OFFSET, NAN_EXPONENT, power_of_two};
use crate::mem::SharedMut;
use crate::pack::{Fault, pack, packed_bytes, unpack};
use crate::parallel::for_each_task;
use crate::shape::{FloatLines, PlaneLayout};

/// `matrices` × `lines` lines of `k` codes, cut into blocks of `block`; one exponent byte per line and block.
#[derive(Clone, Debug)]
pub(crate) struct Codes {
    pub(crate) format: BlockFormat,
    pub(crate) matrices: usize,
    pub(crate) lines: usize,
    pub(crate) k: usize,
    pub(crate) block: usize,
    pub(crate) codes: Vec<i16>,
    pub(crate) exponents: Vec<u8>,
}

impl Codes {
    fn zeros(format: BlockFormat, matrices: usize, lines: usize, k: usize) -> Self {
        let block = format.block_along(k);
        let rows = matrices * lines;
        let (codes, exponents) = (vec![0; rows * k], vec![0; rows * k.div_ceil(block)]);
        Self { format, matrices, lines, k, block, codes, exponents }
    }

    pub(crate) fn blocks(&self) -> usize {
        self.k.div_ceil(self.block)
    }

    /// Gives blocks of zeros the exponent byte 0, as the encoder does.
    pub(crate) fn clear_zero_blocks(&mut self) {
        let blocks = self.blocks();
        for (place, c) in self.exponents.iter_mut().enumerate() {
            let (line, at) = (place / blocks, place % blocks * self.block);
            let block = &self.codes[line * self.k..][at..self.k.min(at + self.block)];
            if *c != NAN_EXPONENT && block.iter().all(|&q| q == 0) {
                *c = 0;
            }
        }
    }

    /// Encodes all lines.
    pub(crate) fn from_floats(ctx: &Context<'_>, x: &FloatLines<'_>, format: BlockFormat, mode: RoundingMode) -> Self {
        let mut out = Self::zeros(format, x.matrices(), x.lines, x.k);
        let (block, blocks, k) = (out.block, out.blocks(), out.k);
        let shared = match format.shape() {
            BlockShape::Line(_) => false,
            BlockShape::Tile(t) => {
                out.exponents_of_tiles(ctx, x, t);
                true
            }
            BlockShape::Tensor => {
                let amax = (0..x.matrices() * x.lines).map(|r| amax_line(ctx, x, r, 0, k)).max().unwrap_or(0);
                out.exponents.fill(format.exponent_code(amax));
                true
            }
        };
        // A tensor-wide block is handled in pieces, so that scratch stays small.
        let piece = block.min(crate::format::MAX_BLOCK);
        let strips = x.lines.div_ceil(STRIP);
        let codes = SharedMut::new(&mut out.codes);
        let exponents = SharedMut::new(&mut out.exponents);
        let scratch = per_worker(ctx, Scratch::default);
        for_each_task(ctx.team, ctx.workers(x.matrices() * x.lines * k), x.matrices() * strips, &|worker, task| {
            let mut scratch = scratch[worker].lock().expect("one task a worker");
            scratch.reserve(piece);
            let (matrix, line) = (task / strips, task % strips * STRIP);
            let width = STRIP.min(x.lines - line);
            for at in (0..k).step_by(piece) {
                let part = Part { matrix, line, width, k: at, n: piece.min(k - at) };
                let from = load_lines(ctx.kernels, x, part, mode, &mut scratch);
                for l in 0..width {
                    let row = matrix * x.lines + line + l;
                    // SAFETY: every line belongs to one task.
                    let (c, line_codes) = unsafe {
                        (&mut exponents.part(row * blocks + at / block, 1)[0], codes.part(row * k + at, part.n))
                    };
                    if !shared {
                        // SAFETY: load_lines made n elements readable.
                        *c = format.exponent_code(unsafe { (ctx.kernels.amax_row)(from.x[l], part.n) });
                    }
                    if *c == NAN_EXPONENT {
                        continue;
                    }
                    let scaling = Scaling::new(&format, *c);
                    let round = ctx.kernels.round_row_i16[mode.rounding as usize];
                    assert!(scratch.wide.len() >= part.n + ROW_PADDING);
                    // SAFETY: n elements are readable with their random bits, and `wide` has room for n and the padding.
                    unsafe { round(from.x[l], part.n, scaling, from.random[l], scratch.wide.as_mut_ptr()) };
                    line_codes.copy_from_slice(&scratch.wide[..part.n]);
                }
            }
        });
        out
    }

    /// Exponents of t × t tiles, repeated for each of a tile's lines.
    fn exponents_of_tiles(&mut self, ctx: &Context<'_>, x: &FloatLines<'_>, t: usize) {
        let blocks = self.blocks();
        for matrix in 0..self.matrices {
            for first in (0..self.lines).step_by(t) {
                let rows = first..(first + t).min(self.lines);
                for b in 0..blocks {
                    let n = t.min(self.k - b * t);
                    let amax = rows.clone().map(|l| amax_line(ctx, x, matrix * self.lines + l, b * t, n)).max();
                    let c = self.format.exponent_code(amax.unwrap_or(0));
                    for l in rows.clone() {
                        self.exponents[(matrix * self.lines + l) * blocks + b] = c;
                    }
                }
            }
        }
    }

    /// Packs codes whose lines follow the planes' order: along the blocked axis, or along the last one for tiles and
    /// whole tensors.
    pub(crate) fn to_planes(&self, layout: &PlaneLayout) -> (Vec<u8>, Vec<u8>) {
        let bits = self.format.bits();
        let mut mantissas = vec![0; layout.mantissas()[0] * layout.mantissas()[1]];
        let exponents = match self.format.shape() {
            BlockShape::Line(n) => {
                let bytes = layout.mantissas()[1];
                for (line, row) in self.codes.chunks_exact(self.k.max(1)).zip(mantissas.chunks_exact_mut(bytes.max(1)))
                {
                    for (codes, out) in line.chunks(n).zip(row.chunks_mut(packed_bytes(n, bits))) {
                        pack(codes, bits, out);
                    }
                }
                self.exponents.clone()
            }
            BlockShape::Tile(t) => {
                let [rows, columns] = layout.matrix;
                let mut exponents = Vec::with_capacity(layout.exponents()[0] * layout.exponents()[1]);
                let mut out = mantissas.chunks_exact_mut(packed_bytes(t * t, bits));
                let mut tile = vec![0i16; t * t];
                for_each_tile(layout.outer, rows, columns, t, |matrix, r, c, height, width| {
                    tile.fill(0);
                    for i in 0..height {
                        let from = (matrix * rows + r + i) * columns + c;
                        tile[i * t..i * t + width].copy_from_slice(&self.codes[from..from + width]);
                    }
                    pack(&tile, bits, out.next().expect("a place for every tile"));
                    exponents.push(self.exponents[(matrix * rows + r) * self.blocks() + c / t]);
                    Ok(())
                })
                .expect("packing can't fail");
                exponents
            }
            BlockShape::Tensor => {
                pack(&self.codes, bits, &mut mantissas);
                self.exponents.first().map_or_else(Vec::new, |&c| vec![c])
            }
        };
        (exponents, mantissas)
    }

    /// Unpacks and checks planes. Lines run along the blocked axis; for tiles and whole tensors along the last dimension,
    /// or along the one before it if `across`.
    ///
    /// # Errors
    /// [`Error::Code`] for planes that no encoder writes.
    pub(crate) fn from_planes(layout: &PlaneLayout, exponents: &[u8], mantissas: &[u8], across: bool) -> Result<Self> {
        let format = layout.format();
        let bits = format.bits();
        debug_assert_eq!(exponents.len(), layout.exponents()[0] * layout.exponents()[1]);
        debug_assert_eq!(mantissas.len(), layout.mantissas()[0] * layout.mantissas()[1]);
        let check = |block: usize, c: u8, bytes: &[u8], codes: &mut [i16]| {
            unpack_block(bytes, bits, c, codes).map_err(|(expected, found)| {
                let columns = layout.exponents()[1].max(1);
                Error::code(expected, format!("{found} in block {} of row {}", block % columns, block / columns))
            })
        };
        let [rows, columns] = layout.matrix;
        match format.shape() {
            BlockShape::Line(n) => {
                // Rows of batches are not told apart here: callers that care set matrices and lines.
                let mut out = Self::zeros(format, 1, layout.exponents()[0], layout.k);
                let blocks = layout.exponents()[1];
                out.exponents.copy_from_slice(exponents);
                let bytes = layout.mantissas()[1];
                let lines = out.codes.chunks_exact_mut(layout.k.max(1)).zip(mantissas.chunks_exact(bytes.max(1)));
                for (r, (line, row)) in lines.enumerate() {
                    for (b, (codes, bytes)) in line.chunks_mut(n).zip(row.chunks(packed_bytes(n, bits))).enumerate() {
                        check(r * blocks + b, exponents[r * blocks + b], bytes, codes)?;
                    }
                }
                Ok(out)
            }
            BlockShape::Tile(t) => {
                let (lines, k) = if across { (columns, rows) } else { (rows, columns) };
                let mut out = Self::zeros(format, layout.outer, lines, k);
                let blocks = out.blocks();
                let mut tiles = mantissas.chunks_exact(packed_bytes(t * t, bits)).zip(exponents).enumerate();
                let mut tile = vec![0i16; t * t];
                for_each_tile(layout.outer, rows, columns, t, |matrix, r, c, height, width| {
                    let (index, (bytes, &exponent)) = tiles.next().expect("planes of the layout's size");
                    check(index, exponent, bytes, &mut tile)?;
                    for (i, j) in (0..t).flat_map(|i| (0..t).map(move |j| (i, j))) {
                        if i < height && j < width {
                            let (line, at) = if across { (c + j, r + i) } else { (r + i, c + j) };
                            let row = matrix * lines + line;
                            out.codes[row * k + at] = tile[i * t + j];
                            out.exponents[row * blocks + at / t] = exponent;
                        } else if tile[i * t + j] != 0 {
                            return Err(Error::code(
                                "zeros outside the tensor",
                                format!("another code in tile {index}"),
                            ));
                        }
                    }
                    Ok(())
                })?;
                Ok(out)
            }
            BlockShape::Tensor => {
                let matrices = layout.k.checked_div(rows * columns).unwrap_or(0);
                let (lines, k) = if across { (columns, rows) } else { (rows, columns) };
                let mut out = Self::zeros(format, matrices, lines, k);
                let Some(&c) = exponents.first() else { return Ok(out) };
                out.exponents.fill(c);
                let mut flat = vec![0i16; layout.k];
                check(0, c, mantissas, &mut flat)?;
                if across {
                    for (i, code) in flat.into_iter().enumerate() {
                        let (matrix, r, j) = (i / (rows * columns), i / columns % rows, i % columns);
                        out.codes[(matrix * lines + j) * k + r] = code;
                    }
                } else {
                    out.codes = flat;
                }
                Ok(out)
            }
        }
    }

    /// Value of every code: `write(line, k, value)`.
    pub(crate) fn decode(&self, mut write: impl FnMut(usize, usize, f32)) {
        let blocks = self.blocks();
        if self.k == 0 {
            return; // of any number of lines
        }
        for line in 0..self.matrices * self.lines {
            for at in (0..self.k).step_by(self.block) {
                let c = self.exponents[line * blocks + at / self.block];
                for j in at..(at + self.block).min(self.k) {
                    write(line, j, decode_code(self.codes[line * self.k + j], c));
                }
            }
        }
    }
}

/// q · 2^s, or the canonical NaN.
#[inline]
pub(crate) fn decode_code(q: i16, c: u8) -> f32 {
    if c == NAN_EXPONENT {
        return crate::format::CANONICAL_NAN;
    }
    f32::from(q) * power_of_two(i32::from(c) - EXPONENT_OFFSET)
}

/// Unpacks one block and checks it against its exponent; what was expected and found otherwise.
pub(crate) fn unpack_block<T: crate::pack::Code>(
    bytes: &[u8],
    bits: u8,
    c: u8,
    codes: &mut [T],
) -> std::result::Result<(), (&'static str, String)> {
    unpack(bytes, bits, codes).map_err(|fault| match fault {
        Fault::Forbidden(i) => ("codes above −2^(m−1)", format!("the forbidden code at element {i}")),
        Fault::Padding => ("zero bits after the last code", "others".into()),
    })?;
    match codes.iter().position(|q| q.to_i16() != 0) {
        Some(i) if c == NAN_EXPONENT => Err(("zero codes under exponent 255", format!("another at element {i}"))),
        _ => Ok(()),
    }
}

fn amax_line(ctx: &Context<'_>, x: &FloatLines<'_>, row: usize, k: usize, n: usize) -> u32 {
    let (matrix, line) = (row / x.lines, row % x.lines);
    if x.k_stride == 1 {
        // SAFETY: n elements of a contiguous line of the view.
        return unsafe { (ctx.kernels.amax_row)(x.at(matrix, line, k), n) };
    }
    // SAFETY: inside the view.
    (k..k + n).map(|k| unsafe { *x.at(matrix, line, k) }.to_bits() & 0x7FFF_FFFF).max().unwrap_or(0)
}

/// Calls `f(matrix, first row, first column, height, width)` for every tile, in the planes' order.
fn for_each_tile(
    matrices: usize,
    rows: usize,
    columns: usize,
    t: usize,
    mut f: impl FnMut(usize, usize, usize, usize, usize) -> Result<()>,
) -> Result<()> {
    // Without elements there may be any number of matrices or rows, which nobody should count to.
    if rows == 0 || columns == 0 {
        return Ok(());
    }
    for matrix in 0..matrices {
        for r in (0..rows).step_by(t) {
            for c in (0..columns).step_by(t) {
                f(matrix, r, c, t.min(rows - r), t.min(columns - c))?;
            }
        }
    }
    Ok(())
}
