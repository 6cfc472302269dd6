//! Encoding tensors into planes, decoding them, quantising in one pass, and measuring what that costs.
#![allow(unsafe_code, reason = "calls of kernels")]

pub(crate) mod blocks;
mod check;
pub(crate) mod codes;
pub(crate) mod filling;
pub(crate) mod forms;
mod measure;
pub(crate) mod panels;
pub(crate) mod relayout;

pub use blocks::RoundingMode;
pub use check::{check, decode};
pub use measure::{Measured, measure};

use crate::arch::generic::encode::{STRIP, Scaling};
use crate::arch::kernels::Kernels;
use crate::error::{Error, Result};
use crate::format::{BlockFormat, BlockShape, CANONICAL_NAN, EXPONENT_OFFSET, NAN_EXPONENT, power_of_two};
use crate::mem::SharedMut;
use crate::parallel::{DefaultFloatMode, Team, for_each_task};
use crate::shape::{FloatTensor, PlaneLayout};
use blocks::{Part, Scratch, load_lines};
use codes::Codes;
use std::sync::Mutex;

/// Where a call runs: on which kernels and on how many threads of which team.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Kernels of a level.
    pub kernels: &'static Kernels,
    /// Threads.
    pub team: &'a dyn Team,
    /// Upper bound on the threads used.
    pub threads: usize,
}

impl Context<'_> {
    /// The widest level of this CPU, on the calling thread.
    #[must_use]
    pub fn serial() -> Context<'static> {
        Context { kernels: Kernels::best(), team: &crate::parallel::Serial, threads: 1 }
    }

    /// Workers for a pass over `elements`: one while waking others would cost more than it saves.
    pub(crate) fn workers(&self, elements: usize) -> usize {
        if elements < 1 << 15 { 1 } else { self.threads.max(1) }
    }
}

/// One slot per possible worker, locked only by it.
pub(crate) fn per_worker<T>(ctx: &Context<'_>, make: impl Fn() -> T) -> Vec<Mutex<T>> {
    (0..ctx.threads.max(1)).map(|_| Mutex::new(make())).collect()
}

/// The two planes of an encoded tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planes {
    /// Exponent bytes, row-major in [`PlaneLayout::exponents`].
    pub exponents: Vec<u8>,
    /// Packed codes, row-major in [`PlaneLayout::mantissas`].
    pub mantissas: Vec<u8>,
}

/// Encodes `x` in blocks along `axis`.
///
/// # Errors
/// [`Error::Shape`] for a bad axis and sizes that overflow.
pub fn encode(
    ctx: &Context<'_>,
    x: &FloatTensor<'_>,
    format: BlockFormat,
    axis: usize,
    mode: RoundingMode,
) -> Result<Planes> {
    let layout = PlaneLayout::new(format, x.shape(), axis)?;
    let mut lines = x.lines(lines_axis(format, x.shape(), axis))?;
    if !matches!(format.shape(), BlockShape::Tile(_)) {
        lines.merge(); // tiles start afresh in each matrix
    }
    let (exponents, mantissas) = Codes::from_floats(ctx, &lines, format, mode).to_planes(&layout);
    Ok(Planes { exponents, mantissas })
}

/// The axis along which codes are produced: tiles and whole tensors go line by line.
fn lines_axis(format: BlockFormat, shape: &[usize], axis: usize) -> usize {
    if matches!(format.shape(), BlockShape::Line(_)) { axis } else { shape.len().saturating_sub(1) }
}

/// `out` ← decode(encode(x)), row-major in x's shape.
///
/// # Safety
/// `out` is valid for writing as many elements as `x` has; it is `x`'s own first element and `x` is row-major, or it
/// does not overlap `x`.
///
/// # Errors
/// As [`encode`].
pub unsafe fn quantize(
    ctx: &Context<'_>,
    x: &FloatTensor<'_>,
    out: *mut f32,
    format: BlockFormat,
    axis: usize,
    mode: RoundingMode,
) -> Result<()> {
    let layout = PlaneLayout::new(format, x.shape(), axis)?;
    let mut lines = x.lines(lines_axis(format, x.shape(), axis))?;
    if !matches!(format.shape(), BlockShape::Tile(_)) {
        lines.merge(); // tiles start afresh in each matrix
    }
    let (count, k) = (lines.matrices() * lines.lines, lines.k);
    // SAFETY: the caller vouches for the output.
    let out = unsafe { SharedMut::from_raw(out, count * k) };
    let BlockShape::Line(block) = format.shape() else {
        // SAFETY: nothing else uses the output.
        let out = unsafe { out.part(0, count * k) };
        let _mode = DefaultFloatMode::enter();
        Codes::from_floats(ctx, &lines, format, mode).decode(|line, j, value| out[line * k + j] = value);
        return Ok(());
    };
    if !(lines.by_line && lines.k_stride == 1) {
        // SAFETY: nothing else uses the output.
        let out = unsafe { out.part(0, count * k) };
        let codes = Codes::from_floats(ctx, &lines, format, mode);
        let _mode = DefaultFloatMode::enter();
        let (inner, k) = (layout.inner, layout.k);
        codes.decode(|row, j, value| out[(row / inner * k + j) * inner + row % inner] = value);
        return Ok(());
    }
    let strips = lines.lines.div_ceil(STRIP);
    let scratch = per_worker(ctx, Scratch::default);
    for_each_task(ctx.team, ctx.workers(count * k), lines.matrices() * strips, &|worker, task| {
        let mut scratch = scratch[worker].lock().expect("one task a worker");
        scratch.reserve(block);
        let (matrix, line) = (task / strips, task % strips * STRIP);
        let width = STRIP.min(lines.lines - line);
        for at in (0..k).step_by(block) {
            let part = Part { matrix, line, width, k: at, n: block.min(k - at) };
            let from = load_lines(ctx.kernels, &lines, part, mode, &mut scratch);
            for l in 0..width {
                // SAFETY: load_lines made n elements readable.
                let c = format.exponent_code(unsafe { (ctx.kernels.amax_row)(from.x[l], part.n) });
                // SAFETY: every line belongs to one task.
                let out = unsafe { out.part((matrix * lines.lines + line + l) * k + at, part.n) };
                if c == NAN_EXPONENT {
                    out.fill(CANONICAL_NAN);
                    continue;
                }
                let (scaling, scale) = (Scaling::new(&format, c), power_of_two(i32::from(c) - EXPONENT_OFFSET));
                let quantize = ctx.kernels.quantize_row[mode.rounding as usize];
                // SAFETY: n readable elements with their random bits, n writable ones, equal or apart.
                unsafe { quantize(from.x[l], part.n, scaling, scale, from.random[l], out.as_mut_ptr()) };
            }
        }
    });
    Ok(())
}

/// Row-major codes of planes.
///
/// # Errors
/// [`Error::Code`] for planes that no encoder writes, [`Error::Shape`] for planes of another size.
pub fn unpack_codes(layout: &PlaneLayout, exponents: &[u8], mantissas: &[u8]) -> Result<Vec<i16>> {
    let codes = checked_codes(layout, exponents, mantissas)?;
    let mut out = vec![0; codes.codes.len()];
    for (i, &q) in codes.codes.iter().enumerate() {
        out[logical_index(layout, i / codes.k, i % codes.k)] = q;
    }
    Ok(out)
}

/// Planes of row-major `codes` under an exponent plane.
///
/// # Errors
/// [`Error::Code`] for codes outside −Q…Q and codes under exponent 255, [`Error::Shape`] for other sizes.
pub fn pack_codes(layout: &PlaneLayout, codes: &[i16], exponents: &[u8]) -> Result<Planes> {
    check_size("codes", codes.len(), crate::shape::element_count(layout.shape())?)?;
    check_size("exponents", exponents.len(), layout.exponents()[0] * layout.exponents()[1])?;
    let format = layout.format();
    let max = format.max_code();
    if let Some(i) = codes.iter().position(|&q| i32::from(q).abs() > max) {
        return Err(Error::code(format!("codes in −{max}…{max}"), format!("{} at flat index {i}", codes[i])));
    }
    // Through zero codes and the given exponents, whose layout the checked reader knows.
    let bytes = layout.mantissas()[0] * layout.mantissas()[1];
    let mut lines = Codes::from_planes(layout, exponents, &vec![0; bytes], false)?;
    let blocks = lines.blocks().max(1);
    for i in 0..lines.codes.len() {
        let (line, j) = (i / lines.k, i % lines.k);
        let q = codes[logical_index(layout, line, j)];
        if q != 0 && lines.exponents[line * blocks + j / lines.block] == NAN_EXPONENT {
            let found = format!("{q} at flat index {}", logical_index(layout, line, j));
            return Err(Error::code("zero codes under exponent 255", found));
        }
        lines.codes[i] = q;
    }
    let (exponents, mantissas) = lines.to_planes(layout);
    Ok(Planes { exponents, mantissas })
}

pub(crate) fn check_size(what: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::shape(format!("{expected} {what}"), found.to_string()))
}

fn checked_codes(layout: &PlaneLayout, exponents: &[u8], mantissas: &[u8]) -> Result<Codes> {
    check_size("exponents", exponents.len(), layout.exponents()[0] * layout.exponents()[1])?;
    check_size("bytes of mantissas", mantissas.len(), layout.mantissas()[0] * layout.mantissas()[1])?;
    Codes::from_planes(layout, exponents, mantissas, false)
}

/// Row-major index of element `k` of a line in the planes' order.
fn logical_index(layout: &PlaneLayout, line: usize, k: usize) -> usize {
    match layout.format().shape() {
        BlockShape::Line(_) => (line / layout.inner * layout.k + k) * layout.inner + line % layout.inner,
        _ => line * layout.matrix[1] + k,
    }
}

/// Flat logical index and bits of the first value that is not finite.
#[must_use]
pub fn first_non_finite(x: &FloatTensor<'_>) -> Option<(usize, u32)> {
    let lines = x.lines(x.shape().len().saturating_sub(1)).ok()?;
    for m in 0..lines.matrices() {
        for line in 0..lines.lines {
            for k in 0..lines.k {
                // SAFETY: inside the view.
                let bits = unsafe { *lines.at(m, line, k) }.to_bits();
                if bits & 0x7F80_0000 == 0x7F80_0000 {
                    return Some(((m * lines.lines + line) * lines.k + k, bits));
                }
            }
        }
    }
    None
}
