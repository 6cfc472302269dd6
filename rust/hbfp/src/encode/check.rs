//! Whether planes hold what an encoder may write, read once and on all threads, nothing unpacked where that can be told
//! from the bytes.

use super::codes::{Codes, unpack_block};
use super::{Context, check_size, per_worker};
use crate::error::{Error, Result};
use crate::format::{BlockShape, NAN_EXPONENT};
use crate::pack::packed_bytes;
use crate::parallel::for_each_task;
use crate::shape::PlaneLayout;
use std::sync::Mutex;

/// Rows of a task.
const ROWS: usize = 64;

/// Checks planes of foreign origin: forbidden codes, padding that is not zero, codes under exponent 255.
///
/// # Errors
/// [`Error::Code`] for the first block that no encoder writes, [`Error::Shape`] for planes of another size.
pub fn check(ctx: &Context<'_>, layout: &PlaneLayout, exponents: &[u8], mantissas: &[u8]) -> Result<()> {
    check_size("exponents", exponents.len(), layout.exponents()[0] * layout.exponents()[1])?;
    check_size("bytes of mantissas", mantissas.len(), layout.mantissas()[0] * layout.mantissas()[1])?;
    let BlockShape::Line(n) = layout.format().shape() else {
        return Codes::from_planes(layout, exponents, mantissas, false).map(drop);
    };
    let (bits, [rows, blocks]) = (layout.format().bits(), layout.exponents());
    if mantissas.is_empty() {
        return Ok(());
    }
    // The fault in the first row that has one: which thread is first must not show.
    let fault: Mutex<Option<(usize, Error)>> = Mutex::new(None);
    let scratch = per_worker(ctx, || vec![0i16; n]);
    for_each_task(ctx.team, ctx.workers(mantissas.len()), rows.div_ceil(ROWS), &|worker, task| {
        let mut scratch = scratch[worker].lock().expect("one task a worker");
        for r in task * ROWS..rows.min((task + 1) * ROWS) {
            let row = &mantissas[r * layout.mantissas()[1]..][..layout.mantissas()[1]];
            for (b, bytes) in row.chunks(packed_bytes(n, bits)).enumerate() {
                let (c, length) = (exponents[r * blocks + b], n.min(layout.k - b * n));
                if is_plain(bytes, bits, length, c) {
                    continue;
                }
                if let Err((expected, found)) = unpack_block(bytes, bits, c, &mut scratch[..length]) {
                    let error = Error::code(expected, format!("{found} in block {b} of row {r}"));
                    let mut first = fault.lock().expect("nothing panics under this lock");
                    if first.as_ref().is_none_or(|(row, _)| r < *row) {
                        *first = Some((r, error));
                    }
                    return;
                }
            }
        }
    });
    fault.into_inner().expect("nothing panics under this lock").map_or(Ok(()), |(_, error)| Err(error))
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
            for shape in shapes {
                let format = BlockFormat::new(bits, shape).unwrap();
                let layout = PlaneLayout::new(format, &[3, 13], 1).unwrap();
                let [mut exponents, mut mantissas] =
                    [layout.exponents(), layout.mantissas()].map(|[rows, bytes]| vec![0u8; rows * bytes]);
                for byte in 0..mantissas.len() {
                    for value in [0x80, 0x88, 0x08, 0x01, 0x7F] {
                        for c in [0, 255] {
                            mantissas[byte] = value;
                            exponents.fill(c);
                            let expected = Codes::from_planes(&layout, &exponents, &mantissas, false).map(drop);
                            let found = check(&Context::serial(), &layout, &exponents, &mantissas);
                            assert_eq!(found, expected, "{format:?}, byte {byte} = {value:#x}, c = {c}");
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
            let error = check(&ctx, &layout, &vec![0; 3000 * 10], &mantissas).unwrap_err();
            assert!(error.to_string().contains("element 17 in block 1 of row 70"), "{error}");
        }
    }

    #[test]
    fn planes_of_other_sizes_are_refused() {
        let layout = PlaneLayout::new(BlockFormat::new(4, BlockShape::Line(64)).unwrap(), &[2, 64], 1).unwrap();
        assert!(matches!(check(&Context::serial(), &layout, &[0], &[0; 64]), Err(Error::Shape { .. })));
        assert!(matches!(check(&Context::serial(), &layout, &[0; 2], &[0; 63]), Err(Error::Shape { .. })));
    }
}
