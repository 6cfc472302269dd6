//! Products of every level against the slow definition, bit for bit: widths, blocks, tails, orientations, exponents,
//! places in memory, epilogues, packed operands.

mod operands;

use hbfp::encode::RoundingMode;
use hbfp::gemm::{Epilogue, Operand, Right, Workspace, prepack};
use hbfp::testing::{Fill, TestRng};
use hbfp::{BlockFormat, Rounding};
use operands::memory::{Placement, Storage};
use operands::{
    ROUNDINGS, TestOperand, assert_same_bits, at_scale, check_product, contexts, has_nan, line, mode, pick, products,
    run,
};

/// Every length below a step of the widest kernel, then multiples of 4, 8, 16, 32 and 64, and their neighbours.
const BLOCKS: [usize; 34] = [
    1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 20, 21, 24, 28, 31, 32, 33, 48, 60, 63, 64, 68, 96, 100, 128,
    255, 256, 260, 1024,
];
const COLUMNS: [usize; 13] = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 70];
/// Exponents of both sides of every border that a sum of two can meet: of f32, of its subnormals, of the fast path.
const SCALES: [i32; 17] = [-127, -126, -100, -75, -74, -65, -64, -63, -62, 0, 1, 51, 52, 53, 54, 64, 118];

#[test]
fn every_width_block_and_orientation_with_tails() {
    let levels = contexts();
    let mut rng = TestRng(11);
    for block in BLOCKS {
        for left in 2..=16 {
            for orientation in 0..4 {
                let right = if left <= 8 { 2 + rng.below(7) } else { 2 + rng.below(15) };
                let (a_by_line, b_by_line) = (orientation & 1 != 0, orientation & 2 != 0);
                // Either side can be the wide one.
                let (left, right) = if rng.below(2) == 0 { (left, right as u8) } else { (right as u8, left) };
                let tail = pick(&mut rng, &[0, 1, 2, 3, 4, 5, block / 2, block - 1]) % block;
                let k = block * (rng.below(128 / block.max(32) + 1) + usize::from(tail == 0)) + tail;
                let (m, n) = (1 + rng.below(9), pick(&mut rng, &COLUMNS));
                let fill = pick(&mut rng, &[Fill::Plain, Fill::Plain, Fill::Wide, Fill::Ties]);
                let modes = [mode(pick(&mut rng, &ROUNDINGS), 1), mode(pick(&mut rng, &ROUNDINGS), 2)];
                let (fa, fb) = (line(left, block), line(right, block));
                let a = TestOperand::new((m, k), a_by_line, fa, fill, modes[0], rng.next_u64());
                let b = TestOperand::new((n, k), b_by_line, fb, Fill::Plain, modes[1], rng.next_u64());
                check_product(&levels, &a, &b, &|| {
                    format!("{m}×{n}×{k} {fa} {fb} by line {a_by_line} {b_by_line} {fill:?} {modes:?}")
                });
            }
        }
    }
}

#[test]
fn every_pair_of_widths() {
    let levels = contexts();
    for left in 2..=16 {
        for right in 2..=16 {
            let stream = u64::from(left) * 16 + u64::from(right);
            let (fa, fb) = (line(left, 32), line(right, 32));
            let a = TestOperand::new((5, 70), true, fa, Fill::Plain, RoundingMode::NEAREST_EVEN, stream);
            let b = TestOperand::new((19, 70), true, fb, Fill::Ties, RoundingMode::NEAREST_EVEN, stream + 9);
            check_product(&levels, &a, &b, &|| format!("{fa} {fb}"));
        }
    }
}

#[test]
fn every_tail_of_rows_and_columns() {
    // All remainders of the rows by 4 and 8, of the columns by 16, 32 and 64, and a second and third panel of each.
    let levels = contexts();
    let (rows, columns, k) = (19, 130, 70);
    for (left, right) in [(4, 4), (8, 4), (6, 6), (8, 8)] {
        for by_line in [true, false] {
            let (fa, fb) = (line(left, 32), line(right, 32));
            let a = TestOperand::new((rows, k), by_line, fa, Fill::Plain, mode(Rounding::Stochastic, 3), 1);
            let b = TestOperand::new((columns, k), by_line, fb, Fill::Wide, mode(Rounding::NearestAway, 4), 2);
            let full = products(&a, &b, None, None);
            // Lines don't know of each other: a smaller product is a corner of the full one.
            let sizes = (1..=rows).map(|m| (m, 33)).chain((1..=columns).map(|n| (5, n)));
            for (m, n) in sizes {
                let expected: Vec<f32> = (0..m * n).map(|i| full[i / n * columns + i % n]).collect();
                for (name, ctx) in &levels {
                    let right = Right::Operand(b.first_lines(n));
                    let start = vec![f32::NAN; m * n];
                    let (a, epilogue) = (a.first_lines(m), Epilogue::default());
                    let found = run(ctx, &a, &right, &start, m % 16, epilogue, &mut Workspace::default());
                    let what = || format!("{name}: {m}×{n}×{k} {fa} {fb} by line {by_line}");
                    assert_same_bits(&found, &expected, n, &what);
                }
            }
        }
    }
}

#[test]
fn operands_anywhere_in_memory() {
    let levels = contexts();
    let mut rng = TestRng(12);
    for (i, &left) in Placement::ALL.iter().enumerate() {
        for (j, &right) in Placement::ALL.iter().enumerate() {
            // Lines enough for a strip of 32 and a narrow one beside it; whole and short blocks.
            let (m, n) = [(37, 33), (5, 66), (32, 32)][(i + j) % 3];
            for (a_by_line, b_by_line) in [(true, true), (true, false), (false, true), (false, false)] {
                let block = pick(&mut rng, &[16, 24, 32, 33]);
                let k = pick(&mut rng, &[32, 45, 48, 70]);
                let (fa, fb) = (line(pick(&mut rng, &[4, 6, 8, 10]), block), line(pick(&mut rng, &[3, 4, 8]), block));
                let (ma, mb) = (mode(pick(&mut rng, &ROUNDINGS), 1), mode(pick(&mut rng, &ROUNDINGS), 2));
                let a = TestOperand::new((m, k), a_by_line, fa, Fill::Plain, ma, rng.next_u64())
                    .placed(left, Storage::Poisoned);
                let b = TestOperand::new((n, k), b_by_line, fb, Fill::Wide, mb, rng.next_u64())
                    .placed(right, Storage::Poisoned);
                check_product(&levels, &a, &b, &|| {
                    let lines = format!("by line {a_by_line} {b_by_line}");
                    format!("{m}×{n}×{k} {fa} {fb} {lines} {left:?} {right:?} {ma:?} {mb:?}")
                });
            }
        }
    }
}

#[test]
fn long_reductions_go_over_the_panels_in_several_passes() {
    // A driver takes a stretch of K at a time (1024 elements, or what caches hold): later passes go on from C.
    let levels = contexts();
    for (k, block) in [(1024, 64), (1025, 64), (2500, 64), (2100, 1000), (3000, 48), (4100, 32), (9000, 256), (4097, 4)]
    {
        for m in [1, 5] {
            let format = line(4, block);
            let a = TestOperand::new((m, k), true, format, Fill::Plain, RoundingMode::NEAREST_EVEN, 1);
            let b = TestOperand::new((18, k), false, format, Fill::Wide, mode(Rounding::Stochastic, 2), 2);
            check_product(&levels, &a, &b, &|| format!("{m}×18×{k} {format}"));
        }
    }
}

#[test]
fn borders_of_the_fast_path() {
    // Scale exponents −63 and 52 are the last in the fast range, −64 and 53 the first outside; 8 bits in blocks of 260
    // and 261 lie on both sides of |D| < 2^22; all codes at ±Q make sums as large as they get.
    let levels = contexts();
    for (bits_a, bits_b) in [(4, 4), (4, 8), (8, 4), (6, 6), (8, 8), (7, 7)] {
        for scale in [-75, -64, -63, 0, 52, 53] {
            for block in [64, 260, 261, 300, 1024] {
                let (fa, fb) = (line(bits_a, block), line(bits_b, block));
                let a = TestOperand::from_elements((4, block), true, fa, |_, _| at_scale(fa.max_code(), scale));
                let b = TestOperand::from_elements((17, block), true, fb, |l, _| {
                    at_scale(if l.is_multiple_of(2) { -fb.max_code() } else { fb.max_code() }, scale)
                });
                check_product(&levels, &a, &b, &|| format!("{fa} {fb} scale {scale}"));
            }
        }
    }
}

#[test]
fn exponents_differ_from_line_to_line_and_block_to_block() {
    // Hunted: a flag that speaks for another panel, exponents in the wrong lane, terms that round or overflow.
    let levels = contexts();
    let mut rng = TestRng(13);
    for case in 0..400 {
        let block = pick(&mut rng, &[4, 8, 16, 20, 32, 64, 128]);
        let (m, n, k) = (1 + rng.below(14), pick(&mut rng, &COLUMNS), block * (1 + rng.below(4)) + rng.below(block));
        let blocks = k.div_ceil(block);
        let operand = |lines: usize, rng: &mut TestRng| {
            let format = line(pick(rng, &[2, 3, 4, 5, 6, 7, 8]), block);
            let usual = pick(rng, &SCALES);
            // All at the border; single lines; single blocks; any exponents at all.
            let kind = rng.below(4);
            let odd_line = rng.below(lines);
            let scales: Vec<i32> = (0..lines * blocks)
                .map(|i| match kind {
                    0 => usual,
                    1 if i / blocks == odd_line => pick(rng, &SCALES),
                    2 if rng.below(20) == 0 => pick(rng, &SCALES),
                    3 => rng.below(246) as i32 - 127,
                    _ => rng.below(30) as i32 - 15,
                })
                .collect();
            let max = format.max_code() as usize;
            let codes: Vec<i32> = (0..lines * k)
                .map(|i| if i % k % block == 0 { max as i32 } else { rng.below(2 * max + 1) as i32 - max as i32 })
                .collect();
            let by_line = rng.below(2) == 0;
            TestOperand::from_elements((lines, k), by_line, format, |l, j| {
                at_scale(codes[l * k + j], scales[l * blocks + j / block])
            })
        };
        let (a, b) = (operand(m, &mut rng), operand(n, &mut rng));
        check_product(&levels, &a, &b, &|| format!("case {case}: {m}×{n}×{k} {} {}", a.format, b.format));
    }
}

#[test]
fn sums_of_exponents_on_both_sides_of_every_border() {
    // The left operand's exponents are drawn, the right one's complete them to a border of the fast path, of f32 or of
    // its subnormals: in all blocks, or in one of them, in one line.
    let levels = contexts();
    let mut rng = TestRng(16);
    for border in [-170, -150, -149, -148, -127, -126, -125, 97, 104, 105, 106, 120, 127] {
        for case in 0..24 {
            let block = pick(&mut rng, &[8, 16, 32, 64]);
            let (m, n, blocks) = (1 + rng.below(9), pick(&mut rng, &COLUMNS), 1 + rng.below(3));
            let (fa, fb) = (line(2 + rng.below(7) as u8, block), line(2 + rng.below(7) as u8, block));
            let half: i32 = border / 2;
            let scales: Vec<i32> = (0..blocks).map(|_| half + pick(&mut rng, &[0, 0, 1, -1, 9, -9])).collect();
            let (here, place) = (case % 2 == 0, (rng.below(n), rng.below(blocks)));
            let right = |l: usize, b: usize| if here || (l, b) == place { border - scales[b] } else { -scales[b] / 2 };
            let mut codes = |max: i32, lines: usize| -> Vec<i32> {
                (0..lines * block * blocks)
                    .map(|i| if i.is_multiple_of(block) { max } else { rng.below(2 * max as usize + 1) as i32 - max })
                    .collect()
            };
            let (k, ca, cb) = (block * blocks, codes(fa.max_code(), m), codes(fb.max_code(), n));
            let a = TestOperand::from_elements((m, k), true, fa, |l, j| at_scale(ca[l * k + j], scales[j / block]));
            let b = TestOperand::from_elements((n, k), true, fb, |l, j| at_scale(cb[l * k + j], right(l, j / block)));
            check_product(&levels, &a, &b, &|| format!("border {border}: {m}×{n}×{k} {fa} {fb} {scales:?} {place:?}"));
        }
    }
}

#[test]
fn blocks_on_both_sides_of_where_sums_overflow() {
    // All codes at ±Q, in blocks just short of and just beyond what 16 bits or the fast path's 22 hold: of a whole block,
    // a half or a quarter of it, of codes as they are or raised by an offset. Codes of the second half may take the first
    // half's sum back: an overflow on the way must not show.
    let levels = contexts();
    for left in 2..=8 {
        for right in 2..=8 {
            let (qa, qb) = (line(left, 1).max_code() as usize, line(right, 1).max_code() as usize);
            let mut blocks: Vec<usize> = [1 << 14, 1 << 15, 1 << 16, 1 << 22]
                .into_iter()
                .flat_map(|limit| [limit / (qa * qb), limit / (qa * (2 * qb + 1))])
                .flat_map(|block| [block, 2 * block, 4 * block])
                .flat_map(|block| [block, block + 1, block / 4 * 4, block / 4 * 4 + 4, block + block / 16])
                .filter(|block| (2..=1024).contains(block))
                .collect();
            blocks.sort_unstable();
            blocks.dedup();
            for block in blocks {
                let (fa, fb) = (line(left, block), line(right, block));
                let sign = |pattern: usize, j: usize| match pattern % 3 {
                    0 => 1,
                    1 => -1,
                    _ => {
                        if 2 * j < block {
                            1
                        } else {
                            -1
                        }
                    }
                };
                let a = TestOperand::from_elements((3, block), true, fa, |l, j| (fa.max_code() * sign(l, j)) as f32);
                let b =
                    TestOperand::from_elements((9, block), true, fb, |l, j| (fb.max_code() * sign(l / 3, j)) as f32);
                check_product(&levels, &a, &b, &|| format!("{fa} {fb}"));
            }
        }
    }
}

#[test]
fn nan_blocks_and_zero_blocks_stay_where_they_are() {
    let levels = contexts();
    let mut rng = TestRng(14);
    for case in 0..150 {
        let block = pick(&mut rng, &[4, 8, 16, 24, 32, 64]);
        let (m, n, blocks) = (1 + rng.below(12), pick(&mut rng, &COLUMNS), 1 + rng.below(4));
        let k = block * blocks - rng.below(block);
        let operand = |lines: usize, rng: &mut TestRng| {
            let format = line(pick(rng, &[2, 4, 5, 6, 7, 8, 9]), block);
            let mut values = Fill::Plain.values(lines * k, rng.next_u64());
            for _ in 0..rng.below(3) {
                let (l, j) = (rng.below(lines), rng.below(k));
                values[l * k + j] = pick(rng, &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
            }
            for _ in 0..rng.below(6) {
                let (l, from) = (rng.below(lines), rng.below(blocks) * block);
                values[l * k..][from..(from + block).min(k)].fill(pick(rng, &[0.0, -0.0]));
            }
            TestOperand::from_elements((lines, k), rng.below(2) == 0, format, |l, j| values[l * k + j])
        };
        let (a, b) = (operand(m, &mut rng), operand(n, &mut rng));
        let nan = has_nan(&a.encoded()) || has_nan(&b.encoded());
        check_product(&levels, &a, &b, &|| format!("case {case}: {m}×{n}×{k} {} {} NaN {nan}", a.format, b.format));
    }
}

#[test]
fn accumulation_bias_batches_and_packing() {
    let levels = contexts();
    let shapes = [
        (3, 6, 21, 100, 64),
        (2, 1, 16, 64, 64),
        (7, 4, 64, 32, 32),
        (5, 9, 33, 70, 16),
        (2, 3, 5, 0, 8),
        (0, 3, 5, 9, 8),
    ];
    for (matrices, m, n, k, block) in shapes {
        for (left, right) in [(4, 6), (8, 4), (9, 4)] {
            for (a_by_line, b_by_line) in [(true, true), (true, false), (false, true)] {
                let random = mode(Rounding::Stochastic, 5);
                let (x, w) = (Fill::Plain.values(matrices * m * k, 1), Fill::Wide.values(matrices.max(1) * n * k, 2));
                let a = TestOperand::of(&x, &[matrices], (m, k), a_by_line, line(left, block), random);
                let many =
                    TestOperand::of(&w[..matrices * n * k], &[matrices], (n, k), b_by_line, line(right, block), random);
                let one = TestOperand::of(&w[..n * k], &[], (n, k), b_by_line, line(right, block), random);
                let bias = Fill::Ties.values(n, 3);
                let start = Fill::NonFinite.values(matrices * m * n, 4);
                for (accumulate, with_bias) in [(false, false), (false, true), (true, false), (true, true)] {
                    let epilogue = Epilogue { accumulate, bias: with_bias.then_some(&bias[..]) };
                    for b in [&many, &one] {
                        let expected = products(&a, b, accumulate.then_some(&start), epilogue.bias);
                        for (name, ctx) in &levels {
                            let mut rights = vec![("unpacked", Right::Operand(b.operand()))];
                            let packed = (b.matrices() == 1).then(|| prepack(ctx, &b.operand()).unwrap());
                            rights.extend(packed.as_ref().map(|packed| ("packed", Right::Packed(packed))));
                            for (how, right) in rights {
                                let workspace = &mut Workspace::default();
                                let found = run(ctx, &a.operand(), &right, &start, 1, epilogue, workspace);
                                assert_same_bits(&found, &expected, n, &|| {
                                    let sizes = format!("{matrices} of {m}×{n}×{k} {} {}", a.format, b.format);
                                    format!("{name}: {sizes} {how} {} right, {accumulate} {with_bias}", b.matrices())
                                });
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn planes_multiply_like_the_floats_they_came_from() {
    let levels = contexts();
    let formats = [
        ("hbfp4b64", "hbfp6b64"),
        ("hbfp2b8", "hbfp8b8"),
        ("hbfp7b20", "hbfp5b20"),
        ("hbfp12b16", "hbfp4b16"),
        ("hbfp4t8", "hbfp5t8"),
        ("hbfp3b8", "hbfp9t8"),
        ("hbfp4tensor", "hbfp8tensor"),
    ];
    for (fa, fb) in formats {
        let (fa, fb): (BlockFormat, BlockFormat) = (fa.parse().unwrap(), fb.parse().unwrap());
        let (m, n, k) = (13, 37, 90);
        for (a_by_line, b_by_line) in [(true, true), (true, false), (false, true), (false, false)] {
            let a = TestOperand::new((m, k), a_by_line, fa, Fill::Wide, mode(Rounding::Stochastic, 1), 1);
            let b = TestOperand::new((n, k), b_by_line, fb, Fill::Plain, RoundingMode::NEAREST_EVEN, 2);
            let expected = products(&a, &b, None, None);
            for (name, ctx) in &levels {
                let (pa, pb) = (a.planes(ctx), b.planes(ctx));
                for (left, a) in [("floats", a.operand()), ("planes", pa.operand())] {
                    for (right, b) in [("floats", b.operand()), ("planes", pb.operand())] {
                        let packed = prepack(ctx, &b).unwrap();
                        for (how, b) in [("unpacked", Right::Operand(b)), ("packed", Right::Packed(&packed))] {
                            let start = vec![f32::NAN; m * n];
                            let found = run(ctx, &a, &b, &start, 0, Epilogue::default(), &mut Workspace::default());
                            assert_same_bits(&found, &expected, n, &|| {
                                format!("{name}: {fa} {left}, {fb} {right} {how}, by line {a_by_line} {b_by_line}")
                            });
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_packed_operand_serves_other_widths_and_numbers_of_rows() {
    let levels = contexts();
    let (n, k) = (70, 150);
    for block in [8, 12, 16, 32, 64, 128] {
        for right in 2..=9 {
            let b = TestOperand::new(
                (n, k),
                right % 2 == 0,
                line(right, block),
                Fill::Plain,
                mode(Rounding::Stochastic, 1),
                1,
            );
            let packed: Vec<_> = levels.iter().map(|(_, ctx)| prepack(ctx, &b.operand()).unwrap()).collect();
            for (ctx, packed) in levels.iter().map(|(_, ctx)| ctx).zip(&packed) {
                assert_eq!((packed.shape(), packed.format()), ((n, k), b.format));
                assert_eq!(packed.level(), ctx.kernels.level());
            }
            // One workspace for all, as a caller has it: what a larger product left there must not show in a smaller one.
            let mut workspaces: Vec<_> = levels.iter().map(|_| Workspace::default()).collect();
            let tile = (block <= 32).then(|| format!("hbfp6t{block}").parse().unwrap());
            let lefts = (2..=10).map(|bits| line(bits, block)).chain(tile);
            for (i, left) in lefts.enumerate() {
                let m = [33, 1, 8, 2, 9, 3, 4, 5, 7, 6, 1][(i + usize::from(right)) % 11];
                let fill = if i % 4 == 3 { Fill::NonFinite } else { Fill::Wide };
                let a = TestOperand::new((m, k), true, left, fill, RoundingMode::NEAREST_EVEN, i as u64);
                let expected = products(&a, &b, None, None);
                for (((name, ctx), packed), workspace) in levels.iter().zip(&packed).zip(&mut workspaces) {
                    let (right, start) = (Right::Packed(packed), vec![f32::NAN; m * n]);
                    let found = run(ctx, &a.operand(), &right, &start, 0, Epilogue::default(), workspace);
                    assert_same_bits(&found, &expected, n, &|| format!("{name}: {m} rows of {left}, {}", b.format));
                }
            }
        }
    }
}

#[test]
fn a_workspace_forgets_the_product_before() {
    // A large product of NaN, extreme exponents and extreme codes first; then small ones with tails in the same buffers.
    let levels = contexts();
    let mut rng = TestRng(15);
    let mut workspaces: Vec<_> = levels.iter().map(|_| Workspace::default()).collect();
    for case in 0..120 {
        let block = pick(&mut rng, &[5, 8, 16, 20, 32, 64, 100]);
        let large = case % 2 == 0;
        let (m, n) = if large { (40, 70) } else { (1 + rng.below(11), pick(&mut rng, &COLUMNS)) };
        let k = if large { 200 } else { 1 + rng.below(2 * block) };
        let fill = if large { pick(&mut rng, &[Fill::Extreme, Fill::NonFinite]) } else { Fill::Plain };
        let mut operand = |lines: usize| {
            let format: BlockFormat = line(pick(&mut rng, &[2, 3, 4, 5, 6, 7, 8]), block);
            TestOperand::new(
                (lines, k),
                rng.below(2) == 0,
                format,
                fill,
                mode(pick(&mut rng, &ROUNDINGS), 1),
                rng.next_u64(),
            )
        };
        let (a, b) = (operand(m), operand(n));
        let expected = products(&a, &b, None, None);
        for ((name, ctx), workspace) in levels.iter().zip(&mut workspaces) {
            let (right, start) = (Right::Operand(b.operand()), vec![f32::NAN; m * n]);
            let found = run(ctx, &a.operand(), &right, &start, 0, Epilogue::default(), workspace);
            assert_same_bits(&found, &expected, n, &|| {
                format!("{name}, case {case}: {m}×{n}×{k} {} {}", a.format, b.format)
            });
            assert!(workspace.bytes() > 0);
        }
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused_before_anything_is_written() {
    let levels = contexts();
    let operand = |lines, k, format: &str| {
        let format = format.parse().unwrap();
        TestOperand::new((lines, k), true, format, Fill::Plain, RoundingMode::NEAREST_EVEN, 1)
    };
    let a = operand(3, 64, "hbfp4b32");
    for (b, columns) in
        [(operand(5, 63, "hbfp4b32"), 5), (operand(5, 64, "hbfp4b16"), 5), (operand(5, 64, "hbfp4b32"), 6)]
    {
        for (name, ctx) in &levels {
            let packed = prepack(ctx, &b.operand()).unwrap();
            for right in [Right::Operand(b.operand()), Right::Packed(&packed)] {
                let (a, mut out): (Operand<'_>, _) = (a.operand(), vec![7.0; 3 * columns]);
                let (epilogue, workspace) = (Epilogue::default(), &mut Workspace::default());
                let result = hbfp::gemm::product(ctx, &a, &right, &mut out, epilogue, workspace);
                assert!(matches!(result, Err(hbfp::Error::Shape { .. })), "{name}: {result:?}");
                assert!(out.iter().all(|&x| x == 7.0), "{name}: written");
            }
        }
    }
}
