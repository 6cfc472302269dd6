//! Planes of foreign origin, read once and on all threads: whether they hold what an encoder may write, and their values.
#![allow(unsafe_code, reason = "tasks that write disjoint rows")]

use super::codes::{Codes, decode_code, unpack_block};
use super::{Context, check_size, logical_index, per_worker};
use crate::error::{Error, Result};
use crate::format::{BlockShape, NAN_EXPONENT};
use crate::mem::{SharedMut, ask_for};
use crate::pack::packed_bytes;
use crate::parallel::{DefaultFloatMode, for_each_task};
use crate::shape::PlaneLayout;
use std::sync::Mutex;

/// Rows of a task.
const ROWS: usize = 64;

/// Checks planes of foreign origin: forbidden codes, padding that is not zero, codes under exponent 255.
///
/// # Errors
/// [`Error::Code`] for the first block that no encoder writes, [`Error::Shape`] for planes of another size.
pub fn check(ctx: &Context<'_>, layout: &PlaneLayout, exponents: &[u8], mantissas: &[u8]) -> Result<()> {
    check_sizes(layout, exponents, mantissas)?;
    let BlockShape::Line(n) = layout.format().shape() else {
        return Codes::from_planes(layout, exponents, mantissas, false).map(drop);
    };
    let bits = layout.format().bits();
    let scratch = per_worker(ctx, || vec![0i16; n]);
    for_each_block(ctx, layout, exponents, mantissas, n, &|worker, block| {
        // Nothing is unpacked where the answer can be told from the bytes.
        if is_plain(block.bytes, bits, block.length, block.c) {
            return Ok(());
        }
        let mut scratch = scratch[worker].lock().expect("one task a worker");
        unpack_block(block.bytes, bits, block.c, &mut scratch[..block.length])
    })
}

/// Values of planes, in the logical shape.
///
/// # Errors
/// [`Error::Code`] for planes that no encoder writes, [`Error::Shape`] for planes of another size.
pub fn decode(ctx: &Context<'_>, layout: &PlaneLayout, exponents: &[u8], mantissas: &[u8]) -> Result<Vec<f32>> {
    check_sizes(layout, exponents, mantissas)?;
    let BlockShape::Line(n) = layout.format().shape() else {
        let codes = Codes::from_planes(layout, exponents, mantissas, false)?;
        let mut out = vec![0.0; codes.codes.len()];
        let _mode = DefaultFloatMode::enter();
        codes.decode(|line, j, value| out[logical_index(layout, line, j)] = value);
        return Ok(out);
    };
    let (bits, k) = (layout.format().bits(), layout.k);
    let mut out = vec![0.0; layout.exponents()[0] * k];
    let values = SharedMut::new(&mut out);
    let scratch = per_worker(ctx, || vec![0i16; n]);
    for_each_block(ctx, layout, exponents, mantissas, n, &|worker, block| {
        let mut scratch = scratch[worker].lock().expect("one task a worker");
        let codes = &mut scratch[..block.length];
        unpack_block(block.bytes, bits, block.c, codes)?;
        if layout.inner == 1 {
            if block.first == 0 && block.row % ROWS == 0 {
                let len = ROWS.min(layout.exponents()[0] - block.row) * k;
                ask_for(values.pointer(block.row * k, len).cast(), len * size_of::<f32>());
            }
            // SAFETY: a part of a row, which belongs to one task.
            let to = unsafe { values.part(block.row * k + block.first, block.length) };
            to.iter_mut().zip(&*codes).for_each(|(to, &q)| *to = decode_code(q, block.c));
        } else {
            for (j, &q) in codes.iter().enumerate() {
                let to = values.pointer(logical_index(layout, block.row, block.first + j), 1);
                // SAFETY: inside the values; an element of a row, which belongs to one task.
                unsafe { *to = decode_code(q, block.c) };
            }
        }
        Ok(())
    })?;
    Ok(out)
}

fn check_sizes(layout: &PlaneLayout, exponents: &[u8], mantissas: &[u8]) -> Result<()> {
    check_size("exponents", exponents.len(), layout.exponents()[0] * layout.exponents()[1])?;
    check_size("bytes of mantissas", mantissas.len(), layout.mantissas()[0] * layout.mantissas()[1])
}

/// A block of a row of planes.
struct Block<'a> {
    row: usize,
    /// Its first element in the row, and how many it has.
    first: usize,
    length: usize,
    c: u8,
    bytes: &'a [u8],
}

/// What was expected, and what was found.
type Fault = (&'static str, String);

/// Calls `read(worker, block)` for all blocks of `n` elements, row by row, on all threads.
///
/// # Errors
/// The fault in the first row that has one: which thread is first does not show.
fn for_each_block(
    ctx: &Context<'_>,
    layout: &PlaneLayout,
    exponents: &[u8],
    mantissas: &[u8],
    n: usize,
    read: &(dyn Fn(usize, Block<'_>) -> std::result::Result<(), Fault> + Sync),
) -> Result<()> {
    if mantissas.is_empty() {
        return Ok(());
    }
    let (bits, [rows, blocks]) = (layout.format().bits(), layout.exponents());
    let failure: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    for_each_task(ctx.team, ctx.workers(mantissas.len()), rows.div_ceil(ROWS), &|worker, task| {
        for row in task * ROWS..rows.min((task + 1) * ROWS) {
            let line = &mantissas[row * layout.mantissas()[1]..][..layout.mantissas()[1]];
            for (b, bytes) in line.chunks(packed_bytes(n, bits)).enumerate() {
                let (c, length) = (exponents[row * blocks + b], n.min(layout.k - b * n));
                if let Err((expected, found)) = read(worker, Block { row, first: b * n, length, c, bytes }) {
                    let error = Error::code(expected, format!("{found} in block {b} of row {row}"));
                    let mut first = failure.lock().expect("nothing panics under this lock");
                    if first.as_ref().is_none_or(|(before, _)| row < *before) {
                        *first = Some((row, error));
                    }
                    return;
                }
            }
        }
    });
    failure.into_inner().expect("nothing panics under this lock").map_or(Ok(()), |(_, error)| Err(error))
}

/// Whether a look at whole bytes finds nothing wrong; where it can't tell it says no.
fn is_plain(bytes: &[u8], bits: u8, length: usize, c: u8) -> bool {
    if c == NAN_EXPONENT {
        return bytes.iter().fold(0, |any, byte| any | byte) == 0;
    }
    match bits {
        // A nibble is 8 where it is 0 with its top bit flipped.
        4 if length.is_multiple_of(2) => {
            !bytes.iter().fold(false, |any, b| any | (b & 0x0F == 0x08) | (b & 0xF0 == 0x80))
        }
        8 => !bytes.iter().fold(false, |any, &b| any | (b == 0x80)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::BlockFormat;

    /// The answer, and the very words, of the reader that unpacks everything, with one byte after another damaged.
    #[test]
    fn says_what_unpacking_says() {
        let shapes = [BlockShape::Line(5), BlockShape::Line(8), BlockShape::Tile(3), BlockShape::Tensor];
        for bits in 2..=16u8 {
            for (shape, axis) in shapes.into_iter().flat_map(|shape| [(shape, 0), (shape, 1)]) {
                let format = BlockFormat::new(bits, shape).unwrap();
                let layout = PlaneLayout::new(format, &[3, 13], axis).unwrap();
                let [mut exponents, mut mantissas] =
                    [layout.exponents(), layout.mantissas()].map(|[rows, bytes]| vec![0u8; rows * bytes]);
                for byte in 0..mantissas.len() {
                    for value in [0x80, 0x88, 0x08, 0x01, 0x7F] {
                        for c in [0, 255] {
                            mantissas[byte] = value;
                            exponents.fill(c);
                            let what = format!("{format:?}, byte {byte} = {value:#x}, c = {c}");
                            let codes = Codes::from_planes(&layout, &exponents, &mantissas, false);
                            let found = check(&Context::serial(), &layout, &exponents, &mantissas);
                            assert_eq!(found.as_ref().err(), codes.as_ref().err(), "{what}");
                            let expected = codes.map(|codes| {
                                let mut out = vec![0; 39];
                                codes.decode(|line, j, x| out[logical_index(&layout, line, j)] = x.to_bits());
                                out
                            });
                            let found = decode(&Context::serial(), &layout, &exponents, &mantissas);
                            assert_eq!(found.map(|x| x.into_iter().map(f32::to_bits).collect()), expected, "{what}");
                        }
                    }
                    mantissas[byte] = 0;
                }
            }
        }
    }

    #[test]
    fn names_the_first_of_many_faults() {
        let format = BlockFormat::new(4, BlockShape::Line(64)).unwrap();
        let layout = PlaneLayout::new(format, &[3000, 640], 1).unwrap();
        let mut mantissas = vec![0u8; 3000 * 320];
        for row in (70..3000).step_by(13) {
            mantissas[row * 320 + 40] = 0x80;
        }
        let pool = crate::parallel::Pool::new();
        let ctx = Context { team: &pool, threads: 4, ..Context::serial() };
        for _ in 0..20 {
            for result in [
                check(&ctx, &layout, &vec![0; 3000 * 10], &mantissas),
                decode(&ctx, &layout, &vec![0; 3000 * 10], &mantissas).map(drop),
            ] {
                let error = result.unwrap_err();
                assert!(error.to_string().contains("element 17 in block 1 of row 70"), "{error}");
            }
        }
    }

    #[test]
    fn planes_of_other_sizes_are_refused() {
        let layout = PlaneLayout::new(BlockFormat::new(4, BlockShape::Line(64)).unwrap(), &[2, 64], 1).unwrap();
        assert!(matches!(check(&Context::serial(), &layout, &[0], &[0; 64]), Err(Error::Shape { .. })));
        assert!(matches!(check(&Context::serial(), &layout, &[0; 2], &[0; 63]), Err(Error::Shape { .. })));
    }
}
