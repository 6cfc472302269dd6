//! Products whose blocks can be brought to one exponent a line, and those that just can't: exponents apart by every
//! distance around what codes have room for, blocks of zeros between them, sums around 2^24.

mod operands;

use hbfp::gemm::{Epilogue, Right, Workspace, prepack};
use hbfp::testing::TestRng;
use operands::{TestOperand, assert_same_bits, at_scale, contexts, line, pick, products, run};

/// Lines whose blocks have exponents from `base` to `base + spread`, each met with in every line of many blocks; of
/// `extremes` in 8 codes that many are the largest. One block in 8 is zero, one line in 16.
fn lines(
    rng: &mut TestRng,
    (lines, k): (usize, usize),
    bits: u8,
    block: usize,
    spread: usize,
    extremes: usize,
) -> Vec<f32> {
    let max = (1 << (bits - 1)) - 1;
    let mut values = vec![0.0; lines * k];
    for row in values.chunks_exact_mut(k.max(1)) {
        let base = pick(rng, &[-30, -3, 0, 0, 2, 20]);
        if rng.below(16) == 0 {
            continue;
        }
        // All of one sign or of both: sums that grow, and that cancel.
        let signs = pick(rng, &[1, 2]);
        for (b, values) in row.chunks_mut(block).enumerate() {
            let scale = match b {
                0 | 1 => b * spread,
                _ if extremes > 4 => spread,
                _ => rng.below(spread + 1),
            };
            let scale = base + scale as i32;
            if rng.below(8) == 0 {
                continue;
            }
            for x in values.iter_mut() {
                let code = if rng.below(8) < extremes { max } else { rng.below(2 * max as usize + 1) as i32 - max };
                *x = at_scale(if rng.below(signs) == 0 { code } else { -code }, scale);
            }
            // The largest code makes the block's exponent this one.
            values[0] = at_scale(max, scale);
        }
    }
    values
}

#[test]
fn exponents_at_every_distance() {
    let levels = contexts();
    for seed in 0..40 {
        let mut rng = TestRng(seed);
        // One case in four: sums as large as they get.
        let large = seed % 4 == 0;
        let bits =
            [0; 2].map(|_| if large { pick(&mut rng, &[4, 8, 8]) } else { pick(&mut rng, &[2, 4, 4, 5, 6, 7, 8]) });
        let block = pick(&mut rng, &[16, 16, 32, 48, 64, 64, 80, 128]);
        // Three panels of rows are the fewest that matter, eight are a group; 4 bits reach 2^24 behind K = 1400.
        let (m, n) = (9 + rng.below(60), 33 + rng.below(70));
        let k = if large { 2900 } else { pick(&mut rng, &[block, 3 * block, 200, 1000, 2100]) };
        let k = k + pick(&mut rng, &[0, 0, 1, 17]);
        // As many places as the codes have room for in a byte; now and then one more.
        let mut spread = |bits: u8| {
            (127 / ((1 << (bits - 1)) - 1_usize)).ilog2() as usize + usize::from(!large && rng.below(5) == 0)
        };
        let spreads = bits.map(&mut spread);
        let extremes = if large { 7 } else { pick(&mut rng, &[0, 4, 7, 8]) };
        let [a, b] = [(m, 0), (n, 1)].map(|(count, i)| {
            let values = lines(&mut rng, (count, k), bits[i], block, spreads[i], extremes);
            let format = line(bits[i], block);
            TestOperand::from_elements((count, k), rng.below(2) == 0, format, |line, at| values[line * k + at])
        });
        let bias: Vec<f32> = (0..n).map(|j| j as f32 / 3.0).collect();
        let mut odd_bias = bias.clone();
        (odd_bias[0], odd_bias[n - 1]) = (f32::from_bits(0xFFC0_1234), f32::NEG_INFINITY);
        let start: Vec<f32> = (0..m * n).map(|i| 1.0 / (1 + i) as f32).collect();
        for (accumulate, bias) in [(false, None), (false, Some(&bias)), (false, Some(&odd_bias)), (true, None)] {
            let bias = bias.map(|bias| &bias[..]);
            let expected = products(&a, &b, accumulate.then_some(&start), bias);
            for (name, ctx) in &levels {
                let packed = prepack(ctx, &b.operand()).unwrap();
                for (how, right) in [("packed", Right::Packed(&packed)), ("unpacked", Right::Operand(b.operand()))] {
                    let epilogue = Epilogue { accumulate, bias };
                    let mut workspace = Workspace::default();
                    let found = run(ctx, &a.operand(), &right, &start, (seed % 2) as usize, epilogue, &mut workspace);
                    let what = || {
                        format!(
                            "{seed}: {name}, {how}: {m}×{n}×{k} {} {} spreads {spreads:?}, extremes {extremes}, {epilogue:?}",
                            a.format, b.format
                        )
                    };
                    assert_same_bits(&found, &expected, n, &what);
                }
            }
        }
    }
}

/// Groups of every number of rows: a tile that leaves out rows it was not asked for must not leave out one that it was.
#[test]
fn every_number_of_rows() {
    let mut rng = TestRng(7);
    let (n, k) = (40, 150);
    let right = lines(&mut rng, (n, k), 4, 64, 1, 4);
    let b = TestOperand::from_elements((n, k), true, line(4, 64), |line, at| right[line * k + at]);
    for m in 1..=40 {
        let left = lines(&mut rng, (m, k), 4, 64, 1, 4);
        let a = TestOperand::from_elements((m, k), true, line(4, 64), |line, at| left[line * k + at]);
        let expected = products(&a, &b, None, None);
        for (name, ctx) in &contexts() {
            let start = vec![f32::NAN; m * n];
            let mut workspace = Workspace::default();
            let right = Right::Operand(b.operand());
            let found = run(ctx, &a.operand(), &right, &start, 0, Epilogue::default(), &mut workspace);
            assert_same_bits(&found, &expected, n, &|| format!("{name}, {m} rows"));
        }
    }
}
