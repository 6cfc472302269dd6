//! Products with everything drawn at random, against the slow definition, bit for bit.
//!
//! `HBFP_CASES` cases from `HBFP_SEED` on: 200 from a fixed seed when they are not set, 10,000 from a seed of the day in
//! `make test-nightly`. A case depends on its own seed alone, which a failure prints.

mod operands;

use hbfp::encode::RoundingMode;
use hbfp::gemm::{Epilogue, Packed, Right, Workspace, prepack};
use hbfp::parallel::Pool;
use hbfp::testing::{Fill, TestRng, all_kernels};
use hbfp::{BlockFormat, BlockShape, Context, ExponentRule};
use operands::memory::{Placement, Storage};
use operands::{ROUNDINGS, TestOperand, assert_same_bits, pick, products, run};

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("expected a whole number in {variable}; found {text:?}"))
    })
}

/// Says how to repeat a case when it ends in a panic of any kind.
struct Case(u64);

impl Drop for Case {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("this case alone: HBFP_SEED={} HBFP_CASES=1 cargo test --test random_products", self.0);
        }
    }
}

fn format(rng: &mut TestRng, bits: u8, block: usize) -> BlockFormat {
    let shape = match rng.below(24) {
        0 if block <= 32 => BlockShape::Tile(block),
        _ => BlockShape::Line(block),
    };
    let rule =
        pick(rng, &[ExponentRule::MaxExponent, ExponentRule::MaxExponent, ExponentRule::Ceil, ExponentRule::NoClip]);
    let format = BlockFormat::new(bits, shape).unwrap().with_rule(rule);
    if rng.below(12) == 0 { format.with_exponent(5, None).unwrap() } else { format }
}

fn width(rng: &mut TestRng) -> u8 {
    if rng.below(8) == 0 { 2 + rng.below(15) as u8 } else { pick(rng, &[2, 3, 4, 4, 4, 5, 6, 6, 7, 8, 8]) }
}

fn operand(rng: &mut TestRng, batch: &[usize], (lines, k): (usize, usize), format: BlockFormat) -> TestOperand {
    let fill = pick(rng, &[Fill::Plain, Fill::Plain, Fill::Wide, Fill::Ties, Fill::Extreme, Fill::NonFinite]);
    let seed = hbfp::rng::Seed { seed: rng.next_u64(), stream: rng.next_u64() };
    let mode = RoundingMode { rounding: pick(rng, &ROUNDINGS), seed };
    let values = fill.values(batch.iter().product::<usize>() * lines * k, rng.next_u64());
    let operand = TestOperand::of(&values, batch, (lines, k), rng.below(2) == 0, format, mode);
    let placement = if rng.below(2) == 0 { Placement::DENSE } else { pick(rng, &Placement::ALL) };
    operand.placed(placement, Storage::Poisoned)
}

#[test]
fn everything_at_random() {
    let levels = all_kernels();
    let pool = Pool::new();
    let first = number("HBFP_SEED", 1);
    for seed in (first..).take(number("HBFP_CASES", 200) as usize) {
        let _case = Case(seed);
        let mut rng = TestRng(seed.wrapping_mul(0xD134_2543_DE82_EF95));
        // Most are small. Some are large enough for threads, some are long, some are few rows of a wide matrix.
        let (m, n, k) = match rng.below(16) {
            0 => (60 + rng.below(140), 100 + rng.below(120), 250 + rng.below(200)),
            1 => (1 + rng.below(5), 1 + rng.below(40), 1000 + rng.below(5000)),
            2..6 => (1 + rng.below(9), 1 + rng.below(200), rng.below(400)),
            _ => (1 + rng.below(70), 1 + rng.below(100), rng.below(300)),
        };
        let block = match rng.below(4) {
            0 => 1 + rng.below(1024),
            1 => 4 * (1 + rng.below(32)),
            _ => pick(&mut rng, &[8, 16, 32, 32, 64, 64, 128, 256]),
        };
        let batch: &[usize] =
            if m * n * k < 200_000 { pick(&mut rng, &[&[][..], &[], &[2], &[1], &[3, 2], &[2, 1, 2]]) } else { &[] };
        let (left, right) = (width(&mut rng), width(&mut rng));
        let (fa, fb) = (format(&mut rng, left, block), format(&mut rng, right, block));
        // Whole tensors have one block along the reduction, which only another whole tensor is sure to share.
        let tensors = rng.below(30) == 0;
        let whole = |bits| BlockFormat::new(bits, BlockShape::Tensor).unwrap();
        let (fa, fb) = if tensors { (whole(left), whole(right)) } else { (fa, fb) };
        let a = operand(&mut rng, batch, (m, k), fa);
        let b = {
            let shared = rng.below(3) == 0;
            operand(&mut rng, if shared { &[] } else { batch }, (n, k), fb)
        };
        let bias = (rng.below(2) == 0).then(|| pick(&mut rng, &Fill::ALL).values(n, seed));
        let accumulate = rng.below(2) == 0;
        let start = pick(&mut rng, &Fill::ALL).values(a.matrices() * m * n, seed ^ 1);
        let (shift, threads) = (rng.below(16), 1 + rng.below(3));
        let planes = [rng.below(4) == 0, rng.below(4) == 0];
        let pack = b.matrices() == 1 && rng.below(2) == 0;
        // What the workspace held before.
        let before = (rng.below(2) == 0).then(|| {
            let block = 1 + rng.below(100);
            let format = |rng: &mut TestRng| BlockFormat::new(2 + rng.below(7) as u8, BlockShape::Line(block)).unwrap();
            let (fa, fb) = (format(&mut rng), format(&mut rng));
            (operand(&mut rng, &[], (40, 200), fa), operand(&mut rng, &[], (70, 200), fb))
        });
        let what = || {
            let (places, modes) = ([a.by_line, b.by_line], [a.mode.rounding, b.mode.rounding]);
            format!(
                "case {seed}: {batch:?} of {m}×{n}×{k} {fa} {fb} by line {places:?} {modes:?} {} right, packed {pack}, \
                 planes {planes:?}, accumulate {accumulate}, bias {}, shift {shift}, threads {threads}, used before {}",
                b.matrices(),
                bias.is_some(),
                before.is_some()
            )
        };
        let expected = products(&a, &b, accumulate.then_some(&start), bias.as_deref());
        for (name, kernels) in &levels {
            let ctx = Context { kernels, team: &pool, threads };
            let mut workspace = Workspace::default();
            if let Some((a, b)) = &before {
                let right = Right::Operand(b.operand());
                run(&ctx, &a.operand(), &right, &[0.0; 40 * 70], 0, Epilogue::default(), &mut workspace);
            }
            let encoded = [&a, &b].map(|operand| operand.planes(&ctx));
            let [left, right] = [&a, &b].map(TestOperand::operand);
            let left = if planes[0] { encoded[0].operand() } else { left };
            let right = if planes[1] { encoded[1].operand() } else { right };
            let packed: Packed;
            let right = if pack {
                packed = prepack(&ctx, &right).unwrap();
                Right::Packed(&packed)
            } else {
                Right::Operand(right)
            };
            let epilogue = Epilogue { accumulate, bias: bias.as_deref() };
            let found = run(&ctx, &left, &right, &start, shift, epilogue, &mut workspace);
            assert_same_bits(&found, &expected, n, &|| format!("{name}: {}", what()));
        }
    }
}
