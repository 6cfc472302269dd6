//! Planes of foreign origin: any format, shape and axis, any bytes. Nothing panics; the readers agree whether the planes
//! are good; good ones, unpacked and packed again, are the same bytes; and so they are laid out for the kernels and read back,
//! at every level, but for the exponents of blocks of zeros.
#![no_main]

use hbfp::encode::{check, decode, pack_codes, unpack_codes};
use hbfp::gemm::{Kept, Operand, keep, kept_bytes};
use hbfp::parallel::Serial;
use hbfp::shape::PlaneLayout;
use hbfp::{BlockFormat, BlockShape, Context, Kernels, Level};
use libfuzzer_sys::fuzz_target;

/// Bytes that a case may allocate.
const LARGEST: usize = 1 << 16;

fuzz_target!(|data: &[u8]| {
    let Some((&[bits, kind, size, axis, dimensions], mut rest)) = data.split_first_chunk::<5>() else { return };
    let shape = match kind % 4 {
        0 => BlockShape::Line(usize::from(size) + 1),
        1 => BlockShape::Line(64),
        2 => BlockShape::Tile(usize::from(size % 32) + 1),
        _ => BlockShape::Tensor,
    };
    let Ok(format) = BlockFormat::new(2 + bits % 15, shape) else { return };
    let mut sizes = Vec::new();
    for _ in 0..dimensions % 5 {
        let Some((&[low, high], more)) = rest.split_first_chunk::<2>() else { return };
        rest = more;
        // Small sizes mostly; now and then one whose products overflow.
        sizes.push(match high {
            255 => usize::MAX >> (low % 64),
            _ => usize::from(low % 160),
        });
    }
    let Ok(layout) = PlaneLayout::new(format, &sizes, usize::from(axis)) else { return };
    let [exponents, mantissas] = [layout.exponents(), layout.mantissas()].map(|[rows, columns]| rows * columns);
    let elements: usize = if sizes.contains(&0) { 0 } else { sizes.iter().product() };
    if exponents.max(mantissas).max(elements) > LARGEST {
        return;
    }
    // What the input does not say is repeated from its start.
    let mut bytes = rest.iter().copied().chain([0]).cycle();
    let exponents: Vec<u8> = bytes.by_ref().take(exponents).collect();
    let mantissas: Vec<u8> = bytes.take(mantissas).collect();
    let good = check(&Context::serial(), &layout, &exponents, &mantissas);
    let codes = unpack_codes(&layout, &exponents, &mantissas);
    let values = decode(&Context::serial(), &layout, &exponents, &mantissas);
    assert_eq!(codes.as_ref().err(), good.as_ref().err());
    assert_eq!(values.as_ref().err(), good.as_ref().err());
    if let &[lines, k] = &sizes[..]
        && axis == 1
    {
        for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
            let ctx = Context { kernels: Kernels::of(level), team: &Serial, threads: 1 };
            let Some(len) = kept_bytes(&ctx, lines, k, format) else { continue };
            let mut bytes = vec![0; len];
            let operand = Operand::Planes { layout: &layout, exponents: &exponents, mantissas: &mantissas, axis: 1 };
            let laid_out = keep(&ctx, &operand, &mut bytes);
            assert_eq!(laid_out.is_ok(), good.is_ok(), "{level}");
            if laid_out.is_ok() {
                let kept = Kept { lines, k, format, bytes: &bytes };
                let (again, codes) = kept.planes(&ctx, &layout).expect("what was kept");
                assert_eq!(codes, mantissas, "{level}");
                assert!(again.iter().zip(&exponents).all(|(&a, &b)| a == b || a == 0), "{level}");
            }
        }
    }
    if let (Ok(codes), Ok(values)) = (codes, values) {
        assert_eq!((codes.len(), values.len()), (elements, elements));
        let again = pack_codes(&layout, &codes, &exponents).expect("codes that were read");
        assert_eq!((again.exponents, again.mantissas), (exponents, mantissas));
    }
    // Planes of other lengths are errors and no panics.
    assert!(check(&Context::serial(), &layout, &[], &[0; 3]).is_err() || elements == 0);
});
