//! All levels and teams among themselves, on products large enough for threads, and the softmax that they share.
//! Encoders and products against the definition: `encoders.rs`, `products.rs`, `few_rows.rs`, `random_products.rs`.

mod operands;

use hbfp::gemm::{Epilogue, Operand, Right, Workspace, product};
use hbfp::parallel::{Pool, Serial, Team};
use hbfp::shape::FloatTensor;
use hbfp::testing::{Fill, Guarded, all_kernels};
use hbfp::{Context, Kernels, Rounding};
use operands::{bits, contexts, line, mode};

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
fn large_outputs_that_go_around_the_caches_are_whole() {
    // Hunted: rows that are not on cache lines, panels at the edges, parts that other threads' stores leave behind.
    let k = 64;
    for (m, n) in [(1000, 2112), (2048, 1024), (1030, 2050)] {
        let (x, w) = (Fill::Plain.values(m * k, 1), Fill::Plain.values(k * n, 2));
        let run = |kernels: &'static Kernels, team: &dyn Team, threads, shift: usize, bias: bool| {
            let ctx = Context { kernels, team, threads };
            let operand = |data, shape: &[usize]| Operand::Floats {
                x: FloatTensor::new(data, shape).unwrap(),
                axis: 1,
                format: line(6, 64),
                mode: mode(Rounding::NearestEven, 0),
            };
            // On a cache line, and off it.
            let mut memory = vec![f32::NAN; m * n + 32];
            let from = (64 - memory.as_ptr() as usize % 64) / 4 % 16 + shift;
            let out = &mut memory[from..][..m * n];
            let epilogue = Epilogue { accumulate: false, bias: bias.then_some(&w[..n]) };
            let b = Right::Operand(operand(&w, &[n, k]));
            product(&ctx, &operand(&x, &[m, k]), &b, out, epilogue, &mut Workspace::default()).unwrap();
            bits(out)
        };
        let best = Kernels::of(hbfp::Level::ALL.into_iter().rev().find(|level| level.is_available()).unwrap());
        for bias in [false, true] {
            let expected = run(Kernels::of(hbfp::Level::Scalar), &Serial, 1, 0, bias);
            assert!(run(best, &Pool::new(), 2, 0, bias) == expected, "{m}×{n}, two threads");
            assert!(run(best, &Serial, 1, 4, bias) == expected, "{m}×{n}, off a cache line");
            assert!(run(hbfp::testing::models::amx(), &Serial, 1, 0, bias) == expected, "{m}×{n}, the model");
        }
    }
}

#[test]
fn softmax_is_a_softmax() {
    let (rows, columns) = (9, 37);
    let x = Fill::Plain.values(rows * columns, 8);
    for (name, ctx) in contexts() {
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
    }
}
