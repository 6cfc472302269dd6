//! Every level against the slow definition, bit for bit. Levels that this machine can't run are named in the output; the
//! generic kernels of both SIMD levels run everywhere on plain arrays (`testing::models`).
#![allow(unsafe_code, reason = "quantize writes through a pointer")]

use hbfp::encode::{RoundingMode, encode, quantize};
use hbfp::gemm::{Epilogue, Operand, Right, Workspace, prepack, product};
use hbfp::parallel::{Pool, Serial, Team};
use hbfp::reference;
use hbfp::rng::Seed;
use hbfp::shape::{FloatTensor, PlaneLayout};
use hbfp::testing::{Fill, Guarded, TestRng, all_kernels};
use hbfp::{BlockFormat, BlockShape, Context, ExponentRule, Kernels, Rounding};

const ROUNDINGS: [Rounding; 4] =
    [Rounding::NearestEven, Rounding::NearestAway, Rounding::TowardZero, Rounding::Stochastic];

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn mode(rounding: Rounding, stream: u64) -> RoundingMode {
    RoundingMode { rounding, seed: Seed { seed: 0x0123_4567_89AB_CDEF, stream } }
}

fn line(bits: u8, block: usize) -> BlockFormat {
    BlockFormat::new(bits, BlockShape::Line(block)).unwrap()
}

/// Runs `test` on the kernels of every level.
fn for_each_level(test: impl Fn(&str, Context<'_>)) {
    for (name, kernels) in all_kernels() {
        test(name, Context { kernels, team: &Serial, threads: 1 });
    }
}

/// One operand of a test product: a tensor of [lines, k] if `by_line`, else [k, lines].
struct TestOperand {
    values: Vec<f32>,
    shape: [usize; 2],
    by_line: bool,
    format: BlockFormat,
    mode: RoundingMode,
}

impl TestOperand {
    fn new(
        (lines, k): (usize, usize),
        by_line: bool,
        format: BlockFormat,
        fill: Fill,
        mode: RoundingMode,
        seed: u64,
    ) -> Self {
        let shape = if by_line { [lines, k] } else { [k, lines] };
        Self { values: fill.values(lines * k, seed), shape, by_line, format, mode }
    }
    fn operand(&self) -> Operand<'_> {
        let x = FloatTensor::new(&self.values, &self.shape).unwrap();
        Operand::Floats { x, axis: usize::from(self.by_line), format: self.format, mode: self.mode }
    }
    fn encoded(&self) -> reference::Encoded {
        let (lines, k) = if self.by_line { (self.shape[0], self.shape[1]) } else { (self.shape[1], self.shape[0]) };
        let element = |l: usize, j: usize| {
            if self.by_line { self.values[l * k + j] } else { self.values[j * lines + l] }
        };
        let block = self.format.block_along(k);
        let random = reference::random(self.mode.seed, self.by_line);
        reference::encode(&self.format, (lines, k, block), element, self.mode.rounding, random)
    }
}

fn check_product(name: &str, ctx: &Context<'_>, a: &TestOperand, b: &TestOperand, (m, n): (usize, usize), what: &str) {
    let mut out = Guarded::new(m * n, 7.0);
    let right = Right::Operand(b.operand());
    product(ctx, &a.operand(), &right, out.elements(), Epilogue::default(), &mut Workspace::default()).unwrap();
    let (ea, eb) = (a.encoded(), b.encoded());
    let expected: Vec<f32> = (0..m * n).map(|i| reference::product(&ea, &eb, i / n, i % n, 0.0, None)).collect();
    assert_eq!(bits(out.checked()), bits(&expected), "{name}: {what}");
}

#[test]
fn encodes_like_the_definition() {
    let mut rng = TestRng(1);
    for_each_level(|name, ctx| {
        let mut rng = rng.clone();
        for case in 0..160 {
            let width = 2 + (case % 15) as u8;
            let block = [1, 3, 8, 16, 33, 64, 100, 1024][rng.below(8)];
            let rule = [ExponentRule::MaxExponent, ExponentRule::Ceil, ExponentRule::NoClip][rng.below(3)];
            let mut format = line(width, block).with_rule(rule);
            if rng.below(4) == 0 {
                format = format.with_exponent(5, None).unwrap();
            }
            let shape = [[1, 200], [37, 70], [5, 1030], [70, 37]][rng.below(4)];
            let (fill, axis) = (Fill::ALL[rng.below(5)], rng.below(2));
            let mode = mode(ROUNDINGS[rng.below(4)], case);
            let values = fill.values(shape[0] * shape[1], case);
            let x = FloatTensor::new(&values, &shape).unwrap();
            let (lines, k) = (shape[1 - axis], shape[axis]);
            let element = |l: usize, j: usize| values[if axis == 1 { l * k + j } else { j * lines + l }];
            let random = reference::random(mode.seed, axis == 1);
            let expected = reference::encode(&format, (lines, k, block), element, mode.rounding, random);
            let planes = encode(&ctx, &x, format, axis, mode).unwrap();
            let what = format!("{name}: {format} {fill:?} {shape:?} axis {axis} {:?}", mode.rounding);
            assert_eq!(planes.exponents, expected.exponents, "{what}");
            let layout = PlaneLayout::new(format, &shape, axis).unwrap();
            let codes = hbfp::encode::unpack_codes(&layout, &planes.exponents, &planes.mantissas).unwrap();
            let logical: Vec<i16> =
                (0..lines * k).map(|i| expected.codes[if axis == 1 { i } else { i % lines * k + i / lines }]).collect();
            assert_eq!(codes, logical, "{what}");
            // decode and quantise agree with each other, and write nowhere else.
            let decoded = hbfp::encode::decode(&layout, &planes.exponents, &planes.mantissas).unwrap();
            let mut out = Guarded::new(lines * k, 0.0);
            // SAFETY: `out` has as many elements as x and lies apart from it.
            unsafe { quantize(&ctx, &x, out.elements().as_mut_ptr(), format, axis, mode).unwrap() };
            assert_eq!(bits(out.checked()), bits(&decoded), "{what}");
        }
    });
    rng.next_u64();
}

#[test]
fn products_of_every_pair_of_widths() {
    for_each_level(|name, ctx| {
        for left in 2..=16 {
            for right in 2..=16 {
                let stream = u64::from(left) * 16 + u64::from(right);
                let a =
                    TestOperand::new((5, 70), true, line(left, 32), Fill::Plain, RoundingMode::NEAREST_EVEN, stream);
                let b = TestOperand::new(
                    (19, 70),
                    true,
                    line(right, 32),
                    Fill::Ties,
                    RoundingMode::NEAREST_EVEN,
                    stream + 9,
                );
                check_product(name, &ctx, &a, &b, (5, 19), &format!("{left} x {right} bits"));
            }
        }
    });
}

#[test]
fn products_of_random_shapes_blocks_and_orientations() {
    for_each_level(|name, ctx| {
        let mut rng = TestRng(3);
        for case in 0..220 {
            let (m, n, k) = (1 + rng.below(70), 1 + rng.below(70), rng.below(300));
            let block = [1, 2, 5, 8, 16, 24, 32, 64, 128, 256][rng.below(10)];
            let widths = [4, 4, 4, 6, 8, 5, 7, 3];
            let (fa, fb) = (line(widths[rng.below(8)], block), line(widths[rng.below(8)], block));
            let fills = [Fill::ALL[rng.below(5)], Fill::ALL[rng.below(5)]];
            let modes = [mode(ROUNDINGS[rng.below(4)], case), mode(ROUNDINGS[rng.below(4)], case + 1000)];
            let a = TestOperand::new((m, k), rng.below(2) == 0, fa, fills[0], modes[0], case);
            let b = TestOperand::new((n, k), rng.below(2) == 0, fb, fills[1], modes[1], case + 77);
            let what = format!(
                "{m}x{n}x{k} {fa} {fb} {fills:?} by_line {} {} {:?} {:?}",
                a.by_line, b.by_line, modes[0].rounding, modes[1].rounding
            );
            check_product(name, &ctx, &a, &b, (m, n), &what);
        }
    });
}

#[test]
fn long_reductions_go_over_the_panels_in_several_passes() {
    // The driver takes 1024 elements of K at a time: later passes go on from C.
    for_each_level(|name, ctx| {
        for (k, block) in [(1024, 64), (1025, 64), (2500, 64), (2100, 1000), (3000, 48)] {
            let format = line(4, block);
            let a = TestOperand::new((5, k), true, format, Fill::Plain, RoundingMode::NEAREST_EVEN, 1);
            let b = TestOperand::new((18, k), false, format, Fill::Wide, mode(Rounding::Stochastic, 2), 2);
            check_product(name, &ctx, &a, &b, (5, 18), &format!("K = {k}, {format}"));
        }
    });
}

#[test]
fn borders_of_the_fast_path() {
    // Scale exponents −74 and 52 are the last in the fast range, −75 and 53 the first outside; 8 bits in blocks of 260
    // and 261 lie on both sides of |D| < 2^22; all codes at ±Q make sums as large as they get.
    for_each_level(|name, ctx| {
        for (bits_a, bits_b) in [(4, 4), (4, 8), (8, 4), (6, 6), (8, 8), (7, 7)] {
            for scale in [-75, -74, 0, 52, 53] {
                for block in [64, 260, 261, 300, 1024] {
                    let (m, n, k) = (4, 17, block);
                    let (fa, fb) = (line(bits_a, block), line(bits_b, block));
                    let a = TestOperand {
                        values: vec![fa.max_code() as f32 * 2f32.powi(scale); m * k],
                        shape: [m, k],
                        by_line: true,
                        format: fa,
                        mode: RoundingMode::NEAREST_EVEN,
                    };
                    let sign = |i: usize| if (i / k).is_multiple_of(2) { -1.0 } else { 1.0 };
                    let b = TestOperand {
                        values: (0..n * k).map(|i| sign(i) * fb.max_code() as f32 * 2f32.powi(scale)).collect(),
                        shape: [n, k],
                        by_line: true,
                        format: fb,
                        mode: RoundingMode::NEAREST_EVEN,
                    };
                    check_product(name, &ctx, &a, &b, (m, n), &format!("{fa} {fb} scale {scale}"));
                }
            }
        }
    });
}

#[test]
fn accumulation_bias_batches_and_packing() {
    for_each_level(|name, ctx| {
        let (matrices, m, n, k) = (3, 6, 21, 100);
        let (fa, fb) = (line(4, 64), line(6, 64));
        let (x, w) = (Fill::Plain.values(matrices * m * k, 1), Fill::Wide.values(matrices * n * k, 2));
        let operand = |data, shape: &[usize], format| Operand::Floats {
            x: FloatTensor::new(data, shape).unwrap(),
            axis: shape.len() - 1,
            format,
            mode: mode(Rounding::Stochastic, 5),
        };
        let encoded = |data: &[f32], lines: usize, format: BlockFormat| {
            let random = reference::random(mode(Rounding::Stochastic, 5).seed, true);
            reference::encode(&format, (lines, k, 64), |l, j| data[l * k + j], Rounding::Stochastic, random)
        };
        let bias = Fill::Ties.values(n, 3);
        let start = Fill::NonFinite.values(matrices * m * n, 4);
        let (ea, eb) = (encoded(&x, matrices * m, fa), encoded(&w, matrices * n, fb));
        for (accumulate, with_bias) in [(false, false), (false, true), (true, false), (true, true)] {
            let epilogue = Epilogue { accumulate, bias: with_bias.then_some(&bias[..]) };
            let a = operand(&x, &[matrices, m, k], fa);
            let expected = |i: usize, shared: bool| {
                let (row, j) = (i / n, i % n);
                let column = if shared { j } else { row / m * n + j };
                let from = if accumulate { start[i] } else { 0.0 };
                reference::product(&ea, &eb, row, column, from, with_bias.then(|| bias[j]))
            };
            let run = |b: &Right<'_>, shared: bool, what: &str| {
                let mut out = Guarded::new(matrices * m * n, 0.0);
                out.elements().copy_from_slice(&start);
                product(&ctx, &a, b, out.elements(), epilogue, &mut Workspace::default()).unwrap();
                let expected: Vec<f32> = (0..matrices * m * n).map(|i| expected(i, shared)).collect();
                assert_eq!(
                    bits(out.checked()),
                    bits(&expected),
                    "{name}: {what}, accumulate {accumulate}, bias {with_bias}"
                );
            };
            run(&Right::Operand(operand(&w, &[matrices, n, k], fb)), false, "batched");
            let one = operand(&w[..n * k], &[n, k], fb);
            run(&Right::Operand(one.clone()), true, "one right matrix");
            run(&Right::Packed(&prepack(&ctx, &one).unwrap()), true, "packed");
        }
    });
}

#[test]
fn planes_multiply_like_the_floats_they_came_from() {
    for_each_level(|name, ctx| {
        for (fa, fb) in [
            ("hbfp4b64", "hbfp6b64"),
            ("hbfp12b16", "hbfp4b16"),
            ("hbfp4t8", "hbfp5t8"),
            ("hbfp4tensor", "hbfp8tensor"),
        ] {
            let (fa, fb): (BlockFormat, BlockFormat) = (fa.parse().unwrap(), fb.parse().unwrap());
            let (m, n, k) = (13, 22, 90);
            for across in [false, true] {
                let (x, w) = (Fill::Wide.values(m * k, 1), Fill::Plain.values(n * k, 2));
                let b_shape = if across { [k, n] } else { [n, k] };
                let axis = usize::from(!across);
                let (xt, wt) = (FloatTensor::new(&x, &[m, k]).unwrap(), FloatTensor::new(&w, &b_shape).unwrap());
                let planes = |x: &FloatTensor<'_>, format, axis| {
                    encode(&ctx, x, format, axis, RoundingMode::NEAREST_EVEN).unwrap()
                };
                let (pa, pb) = (planes(&xt, fa, 1), planes(&wt, fb, axis));
                let (la, lb) =
                    (PlaneLayout::new(fa, &[m, k], 1).unwrap(), PlaneLayout::new(fb, &b_shape, axis).unwrap());
                let a = Operand::Planes { layout: &la, exponents: &pa.exponents, mantissas: &pa.mantissas, axis: 1 };
                let b = Operand::Planes { layout: &lb, exponents: &pb.exponents, mantissas: &pb.mantissas, axis };
                let mode = RoundingMode::NEAREST_EVEN;
                let af = Operand::Floats { x: xt, axis: 1, format: fa, mode };
                let bf = Operand::Floats { x: wt, axis, format: fb, mode };
                let run = |a: &Operand<'_>, b: Operand<'_>, pack: bool| {
                    let mut out = Guarded::new(m * n, 0.0);
                    let packed;
                    let right = if pack {
                        packed = prepack(&ctx, &b).unwrap();
                        Right::Packed(&packed)
                    } else {
                        Right::Operand(b)
                    };
                    product(&ctx, a, &right, out.elements(), Epilogue::default(), &mut Workspace::default()).unwrap();
                    bits(out.checked())
                };
                let expected = run(&af, bf.clone(), false);
                assert_eq!(run(&a, b.clone(), false), expected, "{name}: {fa} {fb} across {across}");
                assert_eq!(run(&a, bf.clone(), true), expected, "{name}: {fa} {fb} across {across}, packed");
                assert_eq!(run(&af, b, true), expected, "{name}: {fa} {fb} across {across}, packed planes");
            }
        }
    });
}

#[test]
fn all_levels_and_teams_agree_on_large_products_and_softmax() {
    let (m, n, k) = (130, 200, 1100);
    let (x, w) = (Fill::Wide.values(m * k, 1), Fill::Plain.values(k * n, 2));
    let run = |kernels: &'static Kernels, team: &dyn Team, threads| {
        let ctx = Context { kernels, team, threads };
        let operand = |data, shape: &[usize], axis, stream| Operand::Floats {
            x: FloatTensor::new(data, shape).unwrap(),
            axis,
            format: line(4, 64),
            mode: mode(Rounding::Stochastic, stream),
        };
        let mut out = vec![0.0; m * n];
        let b = Right::Operand(operand(&w, &[k, n], 0, 1));
        product(&ctx, &operand(&x, &[m, k], 1, 0), &b, &mut out, Epilogue::default(), &mut Workspace::default())
            .unwrap();
        let softmax = hbfp::attention::Softmax { rows: m, columns: n, scale: 0.37, causal: true, mask: None };
        let mut p = out.clone();
        softmax.apply(&ctx, &mut p).unwrap();
        let mut grad = out.clone();
        hbfp::attention::softmax_backward(&ctx, &p, &mut grad, n, 0.37).unwrap();
        let mut sums = vec![0.0; n];
        hbfp::sums::column_sums(&ctx, &out, &mut sums).unwrap();
        [bits(&out), bits(&p), bits(&grad), bits(&sums)]
    };
    let pool = Pool::new();
    let expected = run(hbfp::testing::models::avx2(), &Serial, 1);
    for (name, kernels) in all_kernels() {
        assert!(run(kernels, &Serial, 1) == expected, "{name}, serial");
        for threads in [2, 3, 7] {
            assert!(run(kernels, &pool, threads) == expected, "{name}, pool of {threads}");
        }
    }
}

#[test]
fn softmax_is_a_softmax() {
    let (rows, columns) = (9, 37);
    let x = Fill::Plain.values(rows * columns, 8);
    for_each_level(|name, ctx| {
        let mut p = Guarded::new(rows * columns, 0.0);
        p.elements().copy_from_slice(&x);
        p.elements()[columns..2 * columns].fill(f32::NEG_INFINITY);
        p.elements()[2 * columns + 5] = f32::NAN;
        let softmax = hbfp::attention::Softmax { rows, columns, scale: 3.0, causal: false, mask: None };
        softmax.apply(&ctx, p.elements()).unwrap();
        let p = p.checked();
        for r in [0, 3, 8] {
            let row = &x[r * columns..][..columns];
            let total: f64 = row.iter().map(|&x| (3.0 * f64::from(x)).exp()).sum();
            for (j, &x) in row.iter().enumerate() {
                let expected = (3.0 * f64::from(x)).exp() / total;
                // Not inside the bit contract of the product: a comparison with exact arithmetic, f32 rounding apart.
                assert!(
                    (f64::from(p[r * columns + j]) - expected).abs() < 1e-6 * expected,
                    "{name}: row {r}, column {j}"
                );
            }
        }
        assert!(p[columns..2 * columns].iter().all(|x| x.to_bits() == 0), "{name}: a row that is masked throughout");
        assert!(p[2 * columns..3 * columns].iter().all(|x| x.to_bits() == 0x7FC0_0000), "{name}: a NaN row");
    });
}
