//! Products of few rows: every number of them that a kernel may have a path of its own for, against columns around every
//! width of a panel, with the codes and exponents that such paths are tempted to assume away.

mod operands;

use hbfp::gemm::{Epilogue, Right, Workspace, prepack};
use hbfp::testing::{Fill, TestRng};
use hbfp::{Context, Rounding};
use operands::{TestOperand, assert_same_bits, at_scale, contexts, line, mode, pick, products, run};

const ROWS: usize = 9;
const COLUMNS: [usize; 11] = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100];
const WIDTHS: [u8; 7] = [2, 3, 4, 5, 6, 7, 8];
const BLOCKS: [usize; 6] = [8, 16, 32, 64, 128, 256];

/// A reduction of some whole blocks and a tail, for each of `BLOCKS`: over 30 blocks for one, two for the longest.
fn reduction(block: usize) -> usize {
    match block {
        8 => 43,
        16 => 16 * 33 + 5,
        32 => 32 * 3,
        64 => 64 * 2 + 1,
        128 => 128 + 30,
        _ => 256 + 12,
    }
}

/// The corners [m, n] of one product of `ROWS` × 100 at every level, packed and not, against the definition.
fn check(
    levels: &[(&str, Context<'_>)],
    a: &TestOperand,
    b: &TestOperand,
    sizes: &[(usize, usize)],
    what: &dyn Fn() -> String,
) {
    let columns = b.lines();
    let full = products(a, b, None, None);
    for (name, ctx) in levels {
        let mut workspace = Workspace::default();
        for n in COLUMNS.into_iter().filter(|&n| sizes.iter().any(|size| size.1 == n)) {
            let packed = prepack(ctx, &b.first_lines(n)).unwrap();
            for m in sizes.iter().filter(|size| size.1 == n).map(|size| size.0) {
                let expected: Vec<f32> = (0..m * n).map(|i| full[i / n * columns + i % n]).collect();
                for (how, right) in [("packed", Right::Packed(&packed)), ("unpacked", Right::Operand(b.first_lines(n)))]
                {
                    let (start, shift) = (vec![f32::NAN; m * n], n % 8);
                    let found = run(ctx, &a.first_lines(m), &right, &start, shift, Epilogue::default(), &mut workspace);
                    let what = || format!("{name}, {how}: {m}×{n} {} {} {}", a.format, b.format, what());
                    assert_same_bits(&found, &expected, n, &what);
                }
            }
        }
    }
}

/// All numbers of rows, each with two or three of the numbers of columns, others from `turn` to turn.
fn some_sizes(turn: usize) -> Vec<(usize, usize)> {
    (0..2 * ROWS + 9).map(|i| (1 + i % ROWS, COLUMNS[(i * 4 + i / ROWS + turn) % 11])).collect()
}

#[test]
fn all_few_rows_and_columns_of_every_width_and_block() {
    let levels = contexts();
    let sizes: Vec<_> = COLUMNS.iter().flat_map(|&n| (1..=ROWS).map(move |m| (m, n))).collect();
    for (i, &width) in WIDTHS.iter().enumerate() {
        for (j, &block) in BLOCKS.iter().enumerate() {
            let k = reduction(block);
            let (fa, fb) = (line(WIDTHS[(2 * i + j) % 7], block), line(width, block));
            let seed = (7 * i + j) as u64;
            let a = TestOperand::new((ROWS, k), (i + j) % 3 != 0, fa, Fill::Plain, mode(Rounding::Stochastic, 1), seed);
            let b = TestOperand::new((100, k), j % 2 == 0, fb, Fill::Plain, mode(Rounding::Stochastic, 2), seed + 100);
            check(&levels, &a, &b, &sizes, &|| format!("K = {k}"));
        }
    }
}

#[test]
fn extreme_codes_of_every_pair_of_widths() {
    // Hunted: sums of 16 bits that overflow or saturate: in a pair, in a lane over a block, before a correction is taken
    // off, and on the way although the total is small.
    let levels = contexts();
    let sign = |pattern: usize, block: usize, j: usize| {
        let negative = match pattern {
            0 => false,
            1 => true,
            2 => j % 2 == 1,
            3 => j % 4 >= 2,
            4 => j % 8 >= 4,
            _ => j % block >= block / 2,
        };
        if negative { -1 } else { 1 }
    };
    let mut turn = 0;
    for left in WIDTHS {
        for right in WIDTHS {
            for block in BLOCKS {
                let k = reduction(block);
                let (fa, fb) = (line(left, block), line(right, block));
                // Every pair of patterns meets in a product of 6 rows and 36 columns or more; with fewer rows turn by turn.
                let a = TestOperand::from_elements((ROWS, k), true, fa, |l, j| {
                    at_scale(fa.max_code() * sign((l + turn) % 6, block, j), 0)
                });
                let b = TestOperand::from_elements((100, k), turn % 2 == 0, fb, |l, j| {
                    at_scale(fb.max_code() * sign((l + l / 6) % 6, block, j), -3)
                });
                let sizes = [(1, 64), (1 + turn % 4, 100), (5 + turn % 4, 33), (9, 17)];
                check(&levels, &a, &b, &sizes, &|| format!("K = {k}"));
                turn += 1;
            }
        }
    }
}

#[test]
fn one_side_of_extreme_codes_against_random_ones() {
    let levels = contexts();
    let mut rng = TestRng(21);
    for (turn, (width, block)) in WIDTHS.iter().flat_map(|&w| BLOCKS.map(|b| (w, b))).enumerate() {
        let k = reduction(block);
        for extreme_left in [false, true] {
            let (fa, fb) = (line(width, block), line(pick(&mut rng, &WIDTHS), block));
            let mut codes = |max: i32, extreme: bool, n: usize| -> Vec<i32> {
                let code = |i: usize| {
                    if extreme || (i % k).is_multiple_of(block) {
                        if rng.below(5) == 0 { -max } else { max }
                    } else {
                        rng.below(2 * max as usize + 1) as i32 - max
                    }
                };
                (0..n).map(code).collect()
            };
            let (ca, cb) = (codes(fa.max_code(), extreme_left, ROWS * k), codes(fb.max_code(), !extreme_left, 100 * k));
            let a = TestOperand::from_elements((ROWS, k), true, fa, |l, j| at_scale(ca[l * k + j], 2));
            let b = TestOperand::from_elements((100, k), true, fb, |l, j| at_scale(cb[l * k + j], 1));
            check(&levels, &a, &b, &some_sizes(turn), &|| format!("K = {k}, extreme left {extreme_left}"));
        }
    }
}

#[test]
fn single_lines_and_blocks_outside_the_fast_range() {
    // NaN blocks, exponents at and beyond both ends of the range, zero blocks: in one line or one block of a panel
    // whose rest is fast, so that fast and general panels stand side by side in one product.
    let levels = contexts();
    let mut rng = TestRng(22);
    let borders = [-127, -120, -75, -65, -64, -63, -62, 51, 52, 53, 54, 100, 118];
    for (turn, (width, block)) in WIDTHS.iter().flat_map(|&w| BLOCKS.map(|b| (w, b))).enumerate() {
        let k = reduction(block);
        let blocks = k.div_ceil(block);
        for kind in 0..3 {
            let mut operand = |lines: usize, width: u8, odd: usize| {
                let format = line(width, block);
                let max = format.max_code();
                let mut values: Vec<f32> = (0..lines * k)
                    .map(|i| {
                        let code = if (i % k).is_multiple_of(block) {
                            max
                        } else {
                            rng.below(2 * max as usize + 1) as i32 - max
                        };
                        at_scale(code, 0)
                    })
                    .collect();
                for _ in 0..odd {
                    let (l, b) = (rng.below(lines), rng.below(blocks));
                    let here = &mut values[l * k..][b * block..k.min((b + 1) * block)];
                    match kind {
                        0 => here[rng.below(here.len())] = pick(&mut rng, &[f32::NAN, f32::INFINITY]),
                        1 => {
                            let scale = pick(&mut rng, &borders);
                            here.iter_mut().for_each(|x| *x = at_scale(*x as i32, scale));
                        }
                        _ => here.fill(-0.0),
                    }
                }
                TestOperand::from_elements((lines, k), lines == ROWS || turn % 2 == 0, format, |l, j| values[l * k + j])
            };
            let (odd_left, odd_right) = [(1, 1), (0, 2), (2, 0), (0, 1), (3, 9), (9, 40)][(turn + kind) % 6];
            let a = operand(ROWS, WIDTHS[(turn + kind) % 7], odd_left);
            let b = operand(100, width, odd_right);
            check(&levels, &a, &b, &some_sizes(turn + kind), &|| format!("K = {k}, kind {kind}, turn {turn}"));
        }
    }
}
