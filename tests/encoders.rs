//! Encoding, decoding and quantising of every level against the slow definition, bit for bit.
#![allow(unsafe_code, reason = "quantize writes through a pointer")]

mod operands;

use hbfp::encode::{Measured, Planes, RoundingMode, decode, encode, measure, quantize, unpack_codes};
use hbfp::reference;
use hbfp::shape::{FloatTensor, PlaneLayout};
use hbfp::testing::{Fill, Guarded, TestRng};
use hbfp::{BlockFormat, Context, ExponentRule, Rounding};
use operands::memory::{Placement, Storage, Tensor};
use operands::{ROUNDINGS, assert_same_bits, at_scale, contexts, line, mode, pick};

const BLOCKS: [usize; 24] =
    [1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 20, 24, 28, 32, 33, 48, 60, 64, 68, 96, 100, 128, 256, 1024];

/// Exponents and row-major codes of lines blocked along `axis`, by the definition. Any rank.
fn definition(x: &Tensor, format: &BlockFormat, axis: usize, mode: RoundingMode) -> (Vec<u8>, Vec<i16>) {
    let (shape, values) = (x.shape(), x.values());
    let inner: usize = shape[axis + 1..].iter().product();
    let (outer, k): (usize, usize) = (shape[..axis].iter().product(), shape[axis]);
    let columns = shape[shape.len() - 1].max(1);
    let flat = |l: usize, j: usize| (l / inner * k + j) * inner + l % inner;
    let element = |l: usize, j: usize| values[flat(l, j)];
    // Random bits follow the tensor's own rows, whatever the axis.
    let random = |l: usize, j: usize| mode.seed.bits((flat(l, j) / columns) as u32, flat(l, j) % columns);
    let sizes = (outer * inner, k, format.block_along(k));
    let encoded = reference::encode(format, sizes, element, mode.rounding, random);
    let mut codes = vec![0; values.len()];
    for (i, &q) in encoded.codes.iter().enumerate() {
        codes[flat(i / k, i % k)] = q;
    }
    (encoded.exponents, codes)
}

#[track_caller]
fn check(
    levels: &[(&str, Context<'_>)],
    x: &Tensor,
    format: BlockFormat,
    axis: usize,
    mode: RoundingMode,
    what: &dyn Fn() -> String,
) {
    let (exponents, codes) = definition(x, &format, axis, mode);
    let layout = PlaneLayout::new(format, x.shape(), axis).unwrap();
    let what = || {
        let (shape, rounding) = (x.shape(), mode.rounding);
        format!("{format} {shape:?} along axis {axis}, {rounding:?}, {}", what())
    };
    let mut first: Option<(Planes, Vec<f32>)> = None;
    let mut measured: Option<Measured> = None;
    for (name, ctx) in levels {
        let found = encode(ctx, &x.view(), format, axis, mode).unwrap();
        assert_eq!(found.exponents, exponents, "{name}: exponents of {}", what());
        // Unpacking is no kernel: its result at one level stands for all that wrote the same planes.
        let (planes, decoded) = first.get_or_insert_with(|| {
            let unpacked = unpack_codes(&layout, &found.exponents, &found.mantissas).unwrap();
            assert_eq!(unpacked, codes, "{name}: codes of {}", what());
            (found.clone(), decode(&Context::serial(), &layout, &found.exponents, &found.mantissas).unwrap())
        });
        assert_eq!(&found, planes, "{name}: {}", what());
        let mut out = Guarded::new(decoded.len() + 3, 7.0);
        // SAFETY: `out` has as many elements as x behind its third, and lies apart from it.
        unsafe { quantize(ctx, &x.view(), out.elements()[3..].as_mut_ptr(), format, axis, mode).unwrap() };
        let (before, found) = out.checked().split_at(3);
        assert_eq!(before, [7.0; 3], "{name}: a write before the output, {}", what());
        assert_same_bits(found, decoded, x.shape()[x.shape().len() - 1], &|| format!("{name}: quantize {}", what()));
        let found = measure(ctx, &x.view(), format, axis, mode).unwrap();
        let known = measured.get_or_insert_with(|| {
            check_measured(&found, x, format, axis, &exponents, &codes, &|| format!("{name}: measured {}", what()));
            found.clone()
        });
        assert_eq!(&found, known, "{name}: measured {}", what());
    }
}

/// What was measured against exponents and row-major codes of lines blocked along `axis`.
#[track_caller]
fn check_measured(
    found: &Measured,
    x: &Tensor,
    format: BlockFormat,
    axis: usize,
    exponents: &[u8],
    codes: &[i16],
    what: &dyn Fn() -> String,
) {
    let (shape, k) = (x.shape(), x.shape()[axis]);
    let inner: usize = shape[axis + 1..].iter().product();
    let (block, mut counts) = (format.block_along(k), [0u64; 3]);
    let (mut signal, mut noise, mut blocks) = (0.0, 0.0, [0u64; 256]);
    exponents.iter().for_each(|&c| blocks[usize::from(c)] += 1);
    for (i, (&value, &q)) in x.values().iter().zip(codes).enumerate() {
        let (line, j) = (i / (k * inner) * inner + i % inner, i / inner % k);
        let c = exponents[line * k.div_ceil(block) + j / block];
        if c != 255 {
            let (value, step) = (f64::from(value), 2f64.powi(i32::from(c) - 127));
            signal += value * value;
            noise += (value - f64::from(q) * step).powi(2);
            counts[0] += u64::from(value != 0.0);
            counts[1] += u64::from(value.abs() > (f64::from(format.max_code()) + 0.5) * step);
            counts[2] += u64::from(value != 0.0 && q == 0);
        }
    }
    assert_eq!([found.nonzero, found.saturated, found.zeroed], counts, "{}", what());
    assert_eq!(found.exponents, blocks, "{}", what());
    // The same terms in another order, in f64.
    for (found, expected) in [(found.signal, signal), (found.noise, noise)] {
        assert!((found - expected).abs() <= 1e-12 * expected, "{}: {found:e}, not {expected:e}", what());
    }
}

#[test]
fn every_width_block_and_axis_with_tails() {
    let levels = contexts();
    let mut rng = TestRng(1);
    for block in BLOCKS {
        for width in 2..=16 {
            let rounding = ROUNDINGS[(width as usize + block) % 4];
            for axis in 0..2 {
                let rule = pick(&mut rng, &[ExponentRule::MaxExponent, ExponentRule::Ceil, ExponentRule::NoClip]);
                let mut format = line(width, block).with_rule(rule);
                if rng.below(4) == 0 {
                    format = format.with_exponent(5, None).unwrap();
                }
                let tail = pick(&mut rng, &[0, 1, 3, 4, block / 2, block - 1]) % block;
                let k = block * (rng.below(128 / block.max(32) + 1) + usize::from(tail == 0)) + tail;
                // A whole strip of lines and a narrow one, or fewer.
                let lines = pick(&mut rng, &[1, 5, 31, 32, 33, 70]);
                let lines = if k > 300 { lines.min(5) } else { lines };
                let shape = if axis == 1 { [lines, k] } else { [k, lines] };
                let fill = pick(&mut rng, &Fill::ALL);
                let values = fill.values(lines * k, rng.next_u64());
                let x = Tensor::new(&values, &shape, Placement::DENSE, Storage::Poisoned);
                check(&levels, &x, format, axis, mode(rounding, rng.next_u64()), &|| format!("{fill:?}"));
            }
        }
    }
}

#[test]
fn tensors_anywhere_in_memory_and_of_every_rank() {
    let levels = contexts();
    let mut rng = TestRng(2);
    let shapes: [&[usize]; 9] =
        [&[45], &[1, 45], &[45, 1], &[37, 70], &[32, 64], &[3, 33, 20], &[2, 3, 5, 36], &[4, 1, 64], &[2, 0, 5]];
    for placement in Placement::ALL {
        for shape in shapes {
            for axis in 0..shape.len() {
                for rounding in ROUNDINGS {
                    let format = line(pick(&mut rng, &[2, 4, 6, 8, 11]), pick(&mut rng, &[1, 8, 16, 24, 32, 33]));
                    let values = Fill::Wide.values(shape.iter().product(), rng.next_u64());
                    let x = Tensor::new(&values, shape, placement, Storage::Poisoned);
                    check(&levels, &x, format, axis, mode(rounding, rng.next_u64()), &|| format!("{placement:?}"));
                }
            }
        }
    }
}

#[test]
fn values_at_the_ends_of_the_range() {
    // Powers of two and their neighbours, ties of every code, subnormals, the largest values, alone and beside others.
    let levels = contexts();
    let mut values = vec![0.0, -0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45, -1e-45, 3e-45];
    for scale in [-149, -148, -140, -130, -127, -126, -125, -75, -74, -1, 0, 1, 52, 53, 126, 127] {
        let power = at_scale(1, scale);
        values.extend([power, -power, f32::from_bits(power.to_bits() + 1), f32::from_bits(power.to_bits() - 1)]);
        values.extend((-9..=9).map(|halves| at_scale(halves, scale - 1)));
    }
    values.truncate(values.len() / 8 * 8);
    let k = values.len();
    for width in 2..=16 {
        for block in [1, 8] {
            for rule in [ExponentRule::MaxExponent, ExponentRule::Ceil, ExponentRule::NoClip] {
                for rounding in ROUNDINGS {
                    let x = Tensor::new(&values, &[k / 8, 8], Placement::DENSE, Storage::Poisoned);
                    let format = line(width, block).with_rule(rule);
                    check(&levels, &x, format, usize::from(width % 2 == 0), mode(rounding, 3), &|| "ends".into());
                }
            }
        }
    }
}

#[test]
fn quantising_in_place() {
    for (name, ctx) in contexts() {
        for shape in [[5, 70], [33, 64], [70, 5]] {
            for (axis, format) in
                [(1, "hbfp4b16"), (0, "hbfp4b16"), (1, "hbfp10b33"), (1, "hbfp6t8"), (0, "hbfp8tensor")]
            {
                let format: BlockFormat = format.parse().unwrap();
                let values = Fill::Wide.values(shape[0] * shape[1], 5);
                let (x, mode) = (FloatTensor::new(&values, &shape).unwrap(), mode(Rounding::Stochastic, 9));
                let planes = encode(&ctx, &x, format, axis, mode).unwrap();
                let layout = PlaneLayout::new(format, &shape, axis).unwrap();
                let expected = decode(&Context::serial(), &layout, &planes.exponents, &planes.mantissas).unwrap();
                let mut out = Guarded::new(values.len(), 0.0);
                out.elements().copy_from_slice(&values);
                let start = out.elements().as_mut_ptr();
                // SAFETY: the view is row-major and starts where the output does.
                unsafe {
                    let x = FloatTensor::from_raw(start, shape.to_vec(), vec![shape[1] as isize, 1]);
                    quantize(&ctx, &x, start, format, axis, mode).unwrap();
                }
                assert_same_bits(out.checked(), &expected, shape[1], &|| format!("{name}: {format} {shape:?} {axis}"));
            }
        }
    }
}
