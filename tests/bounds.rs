//! Reads and writes stay inside what the caller gave.
//!
//! Natively, operands lie between pages without access: a read past one ends this file's process with SIGSEGV
//! (`cargo test --test bounds -- --nocapture` shows the case). `make memcheck` runs the tests whose names start with
//! `memcheck` under valgrind, at the levels that it knows, on memory of just the operand's size whose gaps were never
//! written: it reports reads past an end and results that depend on what nobody wrote.

mod operands;

use hbfp::encode::{encode, quantize};
use hbfp::gemm::{Epilogue, Right, Workspace, prepack};
use hbfp::parallel::Pool;
use hbfp::testing::{Fill, TestRng};
use hbfp::{Context, Kernels, Level, Rounding};
use operands::memory::{Placement, Storage};
use operands::{ROUNDINGS, TestOperand, assert_same_bits, line, mode, pick, products, serial};

/// The levels themselves: models check their indices.
fn levels() -> Vec<(&'static str, Context<'static>)> {
    let levels = Level::ALL.into_iter().filter(|level| level.is_available());
    levels.map(|level| (level.name(), serial(Kernels::of(level)))).collect()
}

/// A product of two operands, packed before or not, with and without a start and a bias, against the definition. The
/// output is a Vec of its own size: valgrind sees its ends.
fn check(ctx: &Context<'_>, workspace: &mut Workspace, a: &TestOperand, b: &TestOperand, what: &dyn Fn() -> String) {
    let (m, n) = (a.lines(), b.lines());
    let (start, bias) = (Fill::Plain.values(m * n, 3), Fill::Plain.values(n, 4));
    let full = products(a, b, Some(&start), Some(&bias));
    let plain = products(a, b, None, None);
    let packed = prepack(ctx, &b.operand()).unwrap();
    for (right, accumulate) in [(Right::Packed(&packed), false), (Right::Operand(b.operand()), true)] {
        let mut out = if accumulate { start.clone() } else { vec![f32::NAN; m * n] };
        let epilogue = Epilogue { accumulate, bias: accumulate.then_some(&bias) };
        hbfp::gemm::product(ctx, &a.operand(), &right, &mut out, epilogue, workspace).unwrap();
        assert_same_bits(&out, if accumulate { &full } else { &plain }, n, what);
    }
}

/// Products whose operands have every placement and both orientations, widths of every path, tails of everything.
fn products_in(storages: &[Storage], cases: usize) {
    let levels = levels();
    let mut rng = TestRng(31);
    for case in 0..cases {
        let block = pick(&mut rng, &[3, 8, 16, 20, 32, 64]);
        let (m, n) = (pick(&mut rng, &[1, 2, 3, 4, 5, 8, 9, 33]), pick(&mut rng, &[1, 15, 17, 31, 32, 33, 65]));
        let k = block * rng.below(3) + 1 + rng.below(block);
        let mut operand = |lines: usize, placements: &[Placement]| {
            let format = line(pick(&mut rng, &[2, 3, 4, 4, 5, 6, 7, 8, 9]), block);
            let mode = mode(pick(&mut rng, &ROUNDINGS), 1);
            let fill = pick(&mut rng, &[Fill::Plain, Fill::Plain, Fill::Extreme]);
            TestOperand::new((lines, k), rng.below(2) == 0, format, fill, mode, rng.next_u64())
                .placed(pick(&mut rng, placements), pick(&mut rng, storages))
        };
        let dense = [Placement::DENSE, Placement { turned: true, ..Placement::DENSE }];
        let placements: &[Placement] = if case % 2 == 0 { &dense } else { &Placement::ALL };
        let (a, b) = (operand(m, placements), operand(n, placements));
        let what = || {
            let formats = format!("{} by line {}, {} by line {}", a.format, a.by_line, b.format, b.by_line);
            format!("case {case}: {m}×{n}×{k} {formats}")
        };
        println!("{}", what());
        for (name, ctx) in &levels {
            check(ctx, &mut Workspace::default(), &a, &b, &|| format!("{name}: {}", what()));
        }
    }
}

/// Batches of small products, whose lines end inside registers and tiles.
fn batches_in(storages: &[Storage], cases: usize) {
    let levels = levels();
    let mut rng = TestRng(33);
    for case in 0..cases {
        let block = pick(&mut rng, &[5, 16, 32, 64, 128]);
        let (m, n) = (pick(&mut rng, &[1, 3, 15, 16, 18, 33]), pick(&mut rng, &[1, 15, 16, 17, 33, 65]));
        let k = 1 + rng.below(block + block / 2);
        let mut operand = |lines: usize| {
            let format = line(pick(&mut rng, &[4, 6, 8]), block);
            let mode = mode(pick(&mut rng, &ROUNDINGS), 1);
            let values = Fill::Plain.values(2 * lines * k, rng.next_u64());
            TestOperand::of(&values, &[2], (lines, k), rng.below(2) == 0, format, mode)
                .placed(Placement::DENSE, pick(&mut rng, storages))
        };
        let (a, b) = (operand(m), operand(n));
        let expected = products(&a, &b, None, None);
        let what = format!("case {case}: {m}×{n}×{k} {} by line {}, by line {}", a.format, a.by_line, b.by_line);
        println!("{what}");
        for (name, ctx) in &levels {
            let mut out = vec![f32::NAN; 2 * m * n];
            let (right, epilogue) = (Right::Operand(b.operand()), Epilogue::default());
            hbfp::gemm::product(ctx, &a.operand(), &right, &mut out, epilogue, &mut Workspace::default()).unwrap();
            assert_same_bits(&out, &expected, n, &|| format!("{name}: {what}"));
        }
    }
}

/// Encoding and quantising tensors of every placement along both axes.
fn encoders_in(storages: &[Storage]) {
    let levels = levels();
    let mut rng = TestRng(32);
    for placement in Placement::ALL {
        for (lines, k) in [(1, 77), (5, 33), (33, 20), (64, 64), (32, 9)] {
            for by_line in [true, false] {
                let format = line(pick(&mut rng, &[2, 4, 6, 8, 12]), pick(&mut rng, &[5, 8, 16, 32]));
                let mode = mode(pick(&mut rng, &ROUNDINGS), 2);
                let x = TestOperand::new((lines, k), by_line, format, Fill::Wide, mode, rng.next_u64())
                    .placed(placement, pick(&mut rng, storages));
                println!("{lines}×{k} by line {by_line} {format} {placement:?} {mode:?}");
                let expected = x.encoded();
                for (name, ctx) in &levels {
                    let planes = encode(ctx, &x.tensor.view(), format, x.axis(), mode).unwrap();
                    assert_eq!(planes.exponents, expected.exponents, "{name}: {format} {placement:?}");
                    // Every byte of the planes takes part in this: valgrind looks at what comparisons depend on.
                    let layout = hbfp::shape::PlaneLayout::new(format, x.tensor.shape(), x.axis()).unwrap();
                    let decoded =
                        hbfp::encode::decode(&Context::serial(), &layout, &planes.exponents, &planes.mantissas)
                            .unwrap();
                    let mut out = vec![f32::NAN; lines * k];
                    quantize_to(ctx, &x, &mut out);
                    assert_same_bits(&out, &decoded, x.tensor.shape()[1], &|| {
                        format!("{name}: {format} {placement:?}")
                    });
                }
            }
        }
    }
}

#[allow(unsafe_code, reason = "quantize writes through a pointer")]
fn quantize_to(ctx: &Context<'_>, x: &TestOperand, out: &mut [f32]) {
    // SAFETY: `out` has as many elements as x and lies apart from it.
    unsafe { quantize(ctx, &x.tensor.view(), out.as_mut_ptr(), x.format, x.axis(), x.mode).unwrap() };
}

#[test]
fn products_read_inside_their_operands() {
    products_in(&[Storage::FencedAfter, Storage::FencedBefore], 600);
}

#[test]
fn batches_read_inside_their_operands() {
    batches_in(&[Storage::FencedAfter], 150);
    batches_in(&[Storage::FencedBefore], 50);
}

#[test]
fn encoders_read_inside_their_tensors() {
    encoders_in(&[Storage::FencedAfter]);
    encoders_in(&[Storage::FencedBefore]);
}

#[test]
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn memcheck_reaches_avx2() {
    // Hunted: a valgrind that hides what the CPU has, so that the tests below say less than they seem to.
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    assert_eq!(Level::Avx2.is_available(), cpu.split_whitespace().any(|flag| flag == "avx2"));
}

#[test]
fn memcheck_products() {
    products_in(&[Storage::Bare], 150);
}

#[test]
fn memcheck_batches() {
    batches_in(&[Storage::Bare], 60);
}

#[test]
fn memcheck_encoders() {
    encoders_in(&[Storage::Bare]);
}

#[test]
fn memcheck_few_rows_and_a_workspace_used_before() {
    for (name, ctx) in levels() {
        let mut workspace = Workspace::default();
        for (turn, block) in [64, 8, 16, 32, 24, 128].into_iter().enumerate() {
            for m in 1..=9 {
                let (left, right) = ([4, 8, 5, 6][(turn + m) % 4], [4, 4, 6, 7, 8][m % 5]);
                let (n, k) = ([33, 17, 64, 15][(turn + m) % 4], 2 * block + [0, 3][m % 2]);
                let (fa, fb) = (line(left, block), line(right, block));
                let a = TestOperand::new((m, k), true, fa, Fill::Plain, mode(Rounding::NearestEven, 0), m as u64)
                    .placed(Placement::DENSE, Storage::Bare);
                let b = TestOperand::new((n, k), m % 2 == 0, fb, Fill::Plain, mode(Rounding::NearestEven, 0), 7)
                    .placed(Placement::DENSE, Storage::Bare);
                check(&ctx, &mut workspace, &a, &b, &|| format!("{name}: {m}×{n}×{k} {fa} {fb}"));
            }
        }
    }
}

#[test]
fn memcheck_threads() {
    // Large enough that encoding and the product are shared out.
    let (m, n, k) = (130, 160, 260);
    let pool = Pool::new();
    let a = TestOperand::new((m, k), true, line(4, 64), Fill::Plain, mode(Rounding::Stochastic, 1), 1)
        .placed(Placement::DENSE, Storage::Bare);
    let b = TestOperand::new((n, k), false, line(4, 64), Fill::Plain, mode(Rounding::Stochastic, 2), 2)
        .placed(Placement::DENSE, Storage::Bare);
    for (name, ctx) in levels() {
        let ctx = Context { team: &pool, threads: 3, ..ctx };
        let mut results = Vec::new();
        for ctx in [ctx, serial(ctx.kernels)] {
            let mut out = vec![f32::NAN; m * n];
            let (right, epilogue) = (Right::Operand(b.operand()), Epilogue::default());
            hbfp::gemm::product(&ctx, &a.operand(), &right, &mut out, epilogue, &mut Workspace::default()).unwrap();
            results.push(out);
        }
        assert_same_bits(&results[0], &results[1], n, &|| format!("{name}: three threads, one thread"));
    }
}
