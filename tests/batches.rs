//! Batches of small products at every level, against the slow definition, bit for bit: where a task takes matrices one by
//! one, a mistake of one may reach the next.

mod operands;

use hbfp::gemm::{Epilogue, Operand, Right, Workspace, product};
use hbfp::parallel::Pool;
use hbfp::shape::FloatTensor;
use hbfp::testing::{Fill, TestRng, all_kernels};
use hbfp::{Context, Rounding};
use operands::memory::{Placement, Storage};
use operands::{ROUNDINGS, TestOperand, assert_same_bits, check_product, contexts, line, mode, pick, products, run};

/// Lines around a register, a tile of the matrix unit, and what is swept at once.
const LINES: [usize; 13] = [1, 3, 8, 15, 16, 17, 31, 32, 33, 47, 48, 64, 70];

/// Shapes, blocks, widths, roundings and orientations; blocks shorter and longer than the unit takes, whole and cut off.
#[test]
fn shapes_blocks_and_orientations() {
    let levels = contexts();
    let mut rng = TestRng(41);
    for case in 0..160 {
        let block = pick(&mut rng, &[1, 4, 8, 12, 16, 20, 32, 64, 64, 64, 100, 128, 256]);
        let k = match rng.below(4) {
            0 => block,
            1 => 1 + rng.below(block),
            _ => (1 + rng.below(2 * block)).min(200),
        };
        let (m, n, matrices) = (pick(&mut rng, &LINES), pick(&mut rng, &LINES), 2 + rng.below(3));
        let mut operand = |lines: usize, stream: u64| {
            let format = line(pick(&mut rng, &[2, 4, 4, 5, 6, 8]), block);
            let fill = pick(&mut rng, &[Fill::Plain, Fill::Plain, Fill::Ties, Fill::Wide]);
            let mode = mode(pick(&mut rng, &ROUNDINGS), stream);
            let values = fill.values(matrices * lines * k, rng.next_u64());
            let operand = TestOperand::of(&values, &[matrices], (lines, k), rng.below(2) == 0, format, mode);
            let placement = if rng.below(3) == 0 { pick(&mut rng, &Placement::ALL) } else { Placement::DENSE };
            operand.placed(placement, Storage::Poisoned)
        };
        let (a, b) = (operand(m, 1), operand(n, 2));
        check_product(&levels, &a, &b, &|| {
            let of = |x: &TestOperand| format!("{} by line {} {:?}", x.format, x.by_line, x.mode);
            format!("case {case}: {matrices} of {m}×{n}×{k} {} times {}", of(&a), of(&b))
        });
    }
}

/// Blocks that begin inside a group of eight columns, whose random bits are one counter's.
#[test]
fn random_bits_of_blocks_that_begin_inside_a_counter() {
    let levels = contexts();
    for (block, m, n) in [(20, 33, 17), (100, 18, 40), (13, 9, 16)] {
        for (a_by_line, b_by_line) in [(true, true), (true, false), (false, true), (false, false)] {
            let operand = |lines: usize, by_line: bool, stream: u64| {
                let k = 2 * block + 3;
                let x = Fill::Plain.values(3 * lines * k, stream);
                let mode = mode(Rounding::Stochastic, stream);
                TestOperand::of(&x, &[3], (lines, k), by_line, line(4, block), mode)
            };
            let (a, b) = (operand(m, a_by_line, 1), operand(n, b_by_line, 2));
            check_product(&levels, &a, &b, &|| format!("{m}×{n} in {block} by line {a_by_line} {b_by_line}"));
        }
    }
}

/// What one matrix of a batch needs the general product for, the others don't: NaN, infinity, exponents at the ends.
#[test]
fn a_matrix_that_needs_the_general_product_among_others() {
    let levels = contexts();
    let (matrices, m, n, k) = (4, 33, 18, 70);
    for (by_line, odd) in [(true, f32::NAN), (false, f32::INFINITY), (true, 1e38), (false, 1e-38), (true, 2e-45)] {
        for (side, line_of, at) in [(0, 32, 69), (0, 0, 0), (1, 17, 64), (1, 15, 3)] {
            let fill = |lines: usize, odd_here: bool, seed: u64| {
                let mut x = Fill::Plain.values(matrices * lines * k, seed);
                if odd_here {
                    // The whole line of small values: else they vanish beside the others.
                    for j in 0..k {
                        let place = if by_line { line_of * k + j } else { j * lines + line_of };
                        let value = &mut x[2 * lines * k + place];
                        *value = if j == at { odd } else { *value * odd.clamp(0.0, 1.0) };
                    }
                }
                TestOperand::of(&x, &[matrices], (lines, k), by_line, line(4, 64), mode(Rounding::NearestEven, 0))
            };
            let (a, b) = (fill(m, side == 0, 1), fill(n, side == 1, 2));
            check_product(&levels, &a, &b, &|| {
                format!("{odd:e} in line {line_of} of operand {side}, by line {by_line}")
            });
        }
    }
}

/// Matrices of zeros have no exponent of their own, and sums of nothing are +0.0.
#[test]
fn matrices_of_zeros() {
    for (name, ctx) in contexts() {
        for k in [16, 64, 128] {
            let zeros =
                TestOperand::of(&vec![-0.0; 3 * 17 * k], &[3], (17, k), true, line(4, 64), mode(ROUNDINGS[0], 0));
            let x = Fill::Plain.values(3 * 20 * k, 1);
            let x = TestOperand::of(&x, &[3], (20, k), false, line(4, 64), mode(ROUNDINGS[0], 0));
            let start = vec![f32::NAN; 3 * 17 * 20];
            let (a, b) = (zeros.operand(), Right::Operand(x.operand()));
            let found = run(&ctx, &a, &b, &start, 0, Epilogue::default(), &mut Workspace::default());
            assert!(found.iter().all(|x| x.to_bits() == 0), "{name}: {k}");
        }
    }
}

/// A task of several matrices, and threads that take turns, change nothing; nor does memory that an earlier batch left.
#[test]
fn threads_and_memory_of_earlier_batches() {
    let pool = Pool::new();
    for (name, kernels) in all_kernels() {
        let workspace = &mut Workspace::default();
        // The last one's second block leaves a piece empty where the first has had codes.
        let cases = [(70, 70, 256, 128), (70, 40, 64, 64), (16, 16, 16, 64), (1, 65, 130, 64), (33, 20, 140, 128)];
        for (case, (m, n, k, block)) in cases.into_iter().enumerate() {
            let matrices = if case == 0 { 4 } else { 30 };
            let operand = |lines: usize, by_line: bool, stream: u64| {
                let x = Fill::Plain.values(matrices * lines * k, stream);
                let mode = mode(Rounding::Stochastic, stream);
                TestOperand::of(&x, &[matrices], (lines, k), by_line, line(4, block), mode)
            };
            let (a, b) = (operand(m, case % 2 == 0, 1), operand(n, case < 2, 2));
            let alone = Context { kernels, team: &hbfp::parallel::Serial, threads: 1 };
            let start = vec![f32::NAN; matrices * m * n];
            let right = Right::Operand(b.operand());
            let expected = run(&alone, &a.operand(), &right, &start, 0, Epilogue::default(), &mut Workspace::default());
            for threads in [1, 2, 3] {
                let ctx = Context { kernels, team: &pool, threads };
                let found = run(&ctx, &a.operand(), &right, &start, 3, Epilogue::default(), workspace);
                assert_same_bits(&found, &expected, n, &|| format!("{name}: {m}×{n}×{k}, {threads} threads"));
            }
        }
    }
}

/// Bias, accumulation and one right matrix for all go another way; both ways agree.
#[test]
fn epilogues_and_a_shared_matrix() {
    let (matrices, m, n, k) = (3, 20, 33, 64);
    let of = |count: usize, lines: usize, seed: u64| {
        let x = Fill::Plain.values(count * lines * k, seed);
        TestOperand::of(&x, &[count], (lines, k), seed == 1, line(4, 64), mode(ROUNDINGS[0], 0))
    };
    let (a, many, one) = (of(matrices, m, 1), of(matrices, n, 2), of(1, n, 3));
    let (start, bias) = (Fill::Ties.values(matrices * m * n, 4), Fill::Plain.values(n, 5));
    for (accumulate, bias) in [(false, None), (true, None), (false, Some(&bias[..]))] {
        for b in [&many, &one] {
            let expected = products(&a, b, accumulate.then_some(&start), bias);
            for (name, ctx) in contexts() {
                let (right, epilogue) = (Right::Operand(b.operand()), Epilogue { accumulate, bias });
                let found = run(&ctx, &a.operand(), &right, &start, 0, epilogue, &mut Workspace::default());
                assert_same_bits(&found, &expected, n, &|| format!("{name}: {accumulate} {}", bias.is_some()));
            }
        }
    }
}

/// Heads of an attention, [batch, sequence, heads, 16] seen as [batch, heads, sequence, 16]: matrices whose lines lie
/// apart, and that do not follow one another in memory.
#[test]
#[allow(unsafe_code, reason = "a view of every third head")]
fn matrices_that_lie_between_one_another() {
    let [batch, sequence, heads, width] = [2, 33, 3, 16];
    let x = Fill::Plain.values(batch * sequence * heads * width, 7);
    let y = Fill::Plain.values(batch * sequence * heads * width, 8);
    let shape = vec![batch, heads, sequence, width];
    let strides = vec![(sequence * heads * width) as isize, width as isize, (heads * width) as isize, 1];
    // SAFETY: all of them lie inside x and y.
    let view = |x: &[f32]| unsafe { FloatTensor::from_raw(x.as_ptr(), shape.clone(), strides.clone()) };
    let dense = |x: &[f32]| -> Vec<f32> {
        let place = |b: usize, h: usize, s: usize, w: usize| ((b * sequence + s) * heads + h) * width + w;
        let rows = (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..sequence).map(move |s| (b, h, s))));
        rows.flat_map(|(b, h, s)| (0..width).map(move |w| (b, h, s, w)))
            .map(|(b, h, s, w)| x[place(b, h, s, w)])
            .collect()
    };
    for rounding in [Rounding::NearestEven, Rounding::Stochastic] {
        for axis in [3, 2] {
            let by_line = axis == 3;
            let (lines, k) = if by_line { (sequence, width) } else { (width, sequence) };
            let of = |x: &[f32], stream| {
                TestOperand::of(&dense(x), &[batch, heads], (lines, k), by_line, line(4, 64), mode(rounding, stream))
            };
            let (a, b) = (of(&x, 1), of(&y, 2));
            let expected = products(&a, &b, None, None);
            for (name, ctx) in contexts() {
                let operand = |x, like: &TestOperand| Operand::Floats { x, axis, format: like.format, mode: like.mode };
                let (left, right) = (operand(view(&x), &a), Right::Operand(operand(view(&y), &b)));
                let mut out = vec![f32::NAN; expected.len()];
                product(&ctx, &left, &right, &mut out, Epilogue::default(), &mut Workspace::default()).unwrap();
                assert_same_bits(&out, &expected, lines, &|| format!("{name}: {rounding:?} along {axis}"));
            }
        }
    }
}
