//! Operands kept beside a product: the codes along another axis that [`Keep`] writes in the same pass, and products that
//! read them, against the definition; and sums of the lines of their left operands.

mod operands;

use hbfp::gemm::{Beside, Epilogue, Keep, Kept, Operand, Right, Workspace, keep, kept_bytes, product, product_beside};
use hbfp::parallel::Pool;
use hbfp::shape::PlaneLayout;
use hbfp::testing::{Fill, Guarded, TestRng};
use hbfp::{BlockFormat, BlockShape, Context, Error, Kernels, Level, Rounding};
use operands::memory::{Placement, Storage};
use operands::{ROUNDINGS, TestOperand, assert_same_bits, contexts, line, mode, pick, products, serial};

/// A · Wᵀ, beside which the tensor of A is kept in the codes of `kept`; then D · keptᵀ, beside which D is summed.
struct Case {
    a: TestOperand,
    w: TestOperand,
    /// The tensor of A in other codes.
    kept: TestOperand,
    d: TestOperand,
    bias: Vec<f32>,
}

impl Case {
    fn draw(rng: &mut TestRng, most: usize, storage: Storage) -> Self {
        let (m, n, k) = (1 + rng.below(most), 1 + rng.below(most), 1 + rng.below(most));
        let [block, kept_block] = [(); 2].map(|()| pick(rng, &[1, 3, 4, 8, 16, 20, 32, 64]));
        let (by_line, kept_by_line) = (rng.below(2) == 0, rng.below(2) == 0);
        let fill =
            |rng: &mut TestRng| pick(rng, &[Fill::Plain, Fill::Plain, Fill::Wide, Fill::Extreme, Fill::NonFinite]);
        let placements: Vec<_> = Placement::ALL.into_iter().filter(|placement| !placement.repeated).collect();
        // Now and then a left operand that no panel holds.
        let widths = [2, 3, 4, 4, 5, 6, 7, 8, 12];
        let coded = |rng: &mut TestRng, widths: &[u8], block: usize, stream: u64| {
            (line(pick(rng, widths), block), mode(pick(rng, &ROUNDINGS), stream))
        };
        let operand = |rng: &mut TestRng, lines: usize, k: usize, block: usize, stream: u64| {
            let (format, mode) = coded(rng, &widths, block, stream);
            TestOperand::new((lines, k), rng.below(2) == 0, format, fill(rng), mode, rng.next_u64())
                .placed(pick(rng, &placements), storage)
        };
        let w = operand(rng, n, k, block, 2);
        let (format, rounding) = coded(rng, &widths, block, 1);
        let placement = pick(rng, &placements);
        let a =
            TestOperand::new((m, k), by_line, format, fill(rng), rounding, rng.next_u64()).placed(placement, storage);
        // Its own lines again, or its columns.
        let (format, rounding) = coded(rng, &widths[..8], kept_block, 3);
        let values = a.tensor.values();
        let along = by_line == kept_by_line;
        let (lines, length) = if along { (m, k) } else { (k, m) };
        let kept = TestOperand::of(&values, &[], (lines, length), kept_by_line, format, rounding);
        let few = pick(rng, &[1, 2, 5, 8, 9, 13, 70]);
        let d = operand(rng, few, length, kept_block, 4);
        Self { a, w, kept, d, bias: Fill::Plain.values(n, 5) }
    }

    /// Both products and the sums, and the kept bytes.
    fn run(&self, ctx: &Context<'_>, workspace: &mut Workspace) -> ([Vec<f32>; 3], Vec<u8>) {
        let (lines, k, format) = (self.kept.lines(), self.kept.k(), self.kept.format);
        let len = kept_bytes(ctx, lines, k, format).unwrap();
        let mut bytes = vec![0xA5; len + 130];
        let keep = Keep { axis: self.kept.axis(), format, mode: self.kept.mode, bytes: &mut bytes[65..65 + len] };
        let mut out = Guarded::new(self.a.lines() * self.w.lines(), f32::NAN);
        let epilogue = Epilogue { accumulate: false, bias: Some(&self.bias) };
        let w = Right::Operand(self.w.operand());
        let beside = Beside { keep: Some(keep), sums: None };
        product_beside(ctx, &self.a.operand(), beside, &w, out.elements(), epilogue, workspace).unwrap();
        assert!(bytes[..65].iter().chain(&bytes[65 + len..]).all(|&b| b == 0xA5), "a write outside the kept bytes");
        let bytes = bytes[65..65 + len].to_vec();
        let mut later = Guarded::new(self.d.lines() * lines, f32::NAN);
        let kept = Right::Kept(Kept { lines, k, format, bytes: &bytes });
        let mut sums = Guarded::new(self.d.lines(), f32::NAN);
        let (d, beside) = (self.d.operand(), Beside { keep: None, sums: Some(sums.elements()) });
        product_beside(ctx, &d, beside, &kept, later.elements(), Epilogue::default(), workspace).unwrap();
        ([out, later, sums].map(|out| out.checked().to_vec()), bytes)
    }

    fn expected(&self) -> [Vec<f32>; 3] {
        let both = [products(&self.a, &self.w, None, Some(&self.bias)), products(&self.d, &self.kept, None, None)];
        let [product, later] = both;
        [product, later, self.expected_sums()]
    }

    /// Sums of D's lines in blocks of 64, by clause 6.7.
    fn expected_sums(&self) -> Vec<f32> {
        let (values, lines, k) = (self.d.tensor.values(), self.d.lines(), self.d.k());
        let at = |line: usize, k_: usize| if self.d.by_line { line * k + k_ } else { k_ * lines + line };
        let sum = |line: usize| {
            let block = |from: usize| (from..k.min(from + 64)).fold(0.0, |sum: f32, k| sum + values[at(line, k)]);
            let total = (0..k).step_by(64).fold(0.0, |sum, from| sum + block(from));
            if total.is_nan() { f32::from_bits(0x7FC0_0000) } else { total }
        };
        (0..lines).map(sum).collect()
    }

    #[track_caller]
    fn check(&self, found: &[Vec<f32>; 3], expected: &[Vec<f32>; 3], what: &dyn Fn() -> String) {
        let columns = [self.w.lines(), self.kept.lines(), 1];
        for (i, name) in ["the product", "the later product", "sums"].into_iter().enumerate() {
            let operands = [&self.a, &self.w, &self.kept, &self.d];
            assert_same_bits(&found[i], &expected[i], columns[i], &|| {
                let text = |x: &TestOperand| {
                    format!("{}×{} {} by line {} {:?}", x.lines(), x.k(), x.format, x.by_line, x.mode.rounding)
                };
                format!("{}: {name} of {:?}", what(), operands.map(text))
            });
        }
    }
}

#[test]
fn what_is_kept_multiplies_as_the_tensor_would() {
    // Hunted: kept codes of the wrong axis, stream or format; tails of lines and blocks; a workspace used before.
    let mut rng = TestRng(61);
    let levels = contexts();
    let mut workspaces: Vec<_> = levels.iter().map(|_| Workspace::default()).collect();
    for number in 0..250 {
        let case = Case::draw(&mut rng, 80, Storage::Poisoned);
        let expected = case.expected();
        for ((name, ctx), workspace) in levels.iter().zip(&mut workspaces) {
            case.check(&case.run(ctx, workspace).0, &expected, &|| format!("{name}: case {number}"));
        }
    }
}

#[test]
fn an_operand_kept_by_itself_is_kept_as_beside_a_product() {
    // Hunted: an axis or a rounding of its own.
    let mut rng = TestRng(65);
    for number in 0..100 {
        let case = Case::draw(&mut rng, 80, Storage::Poisoned);
        for (name, ctx) in contexts() {
            let mut workspace = Workspace::default();
            let (_, beside) = case.run(&ctx, &mut workspace);
            let mut alone = vec![0xA5; beside.len()];
            let format = case.kept.format;
            keep(&ctx, &case.kept.operand(), &mut alone).unwrap();
            let [lines, k] = [case.kept.lines(), case.kept.k()];
            let mut out = vec![f32::NAN; case.d.lines() * lines];
            let kept = Right::Kept(Kept { lines, k, format, bytes: &alone });
            product(&ctx, &case.d.operand(), &kept, &mut out, Epilogue::default(), &mut workspace).unwrap();
            assert_same_bits(&out, &case.expected()[1], lines, &|| format!("{name}: case {number}"));
            let error = keep(&ctx, &case.kept.operand(), &mut alone[1..]);
            assert!(matches!(error, Err(Error::Shape { .. })), "{error:?}");
        }
    }
}

#[test]
fn teams_of_any_size_keep_the_same() {
    // Hunted: jobs that take turns over one tensor, of which one gets a task twice and another never.
    let pool = Pool::new();
    let coded = |bits, stream| (line(bits, 64), mode(Rounding::Stochastic, stream));
    let operand = |lines, k, by_line, (format, mode), seed| {
        TestOperand::new((lines, k), by_line, format, Fill::Plain, mode, seed)
    };
    let (m, n, k) = (300, 130, 950);
    for kept_bits in [4, 6] {
        for by_line in [true, false] {
            let a = operand(m, k, by_line, coded(4, 1), 1);
            let (format, rounding) = coded(kept_bits, 3);
            let kept = TestOperand::of(&a.tensor.values(), &[], (k, m), !by_line, format, rounding);
            let d = operand(70, m, false, coded(6, 4), 3);
            let case = Case { a, w: operand(n, k, true, coded(5, 2), 2), kept, d, bias: vec![0.5; n] };
            let expected = case.expected();
            for (name, ctx) in contexts() {
                let mut workspace = Workspace::default();
                for threads in [1, 3, 2] {
                    let ctx = Context { team: &pool, threads, ..ctx };
                    let (found, _) = case.run(&ctx, &mut workspace);
                    case.check(&found, &expected, &|| format!("{name}, {threads} threads"));
                }
            }
        }
    }
}

#[test]
fn bytes_of_any_content_are_read_inside_their_bounds() {
    // Hunted: an index, a shift or a sum that trusts a file. What comes out is anybody's guess.
    let mut rng = TestRng(62);
    for _ in 0..150 {
        let case = Case::draw(&mut rng, 50, Storage::Poisoned);
        let (lines, k, format) = (case.kept.lines(), case.kept.k(), case.kept.format);
        for (_, ctx) in contexts() {
            let len = kept_bytes(&ctx, lines, k, format).unwrap();
            let bytes: Box<[u8]> = (0..len).map(|_| rng.next_u64() as u8).collect();
            let mut out = Guarded::new(case.d.lines() * lines, f32::NAN);
            let mut multiply = |bytes| {
                let kept = Right::Kept(Kept { lines, k, format, bytes });
                product(&ctx, &case.d.operand(), &kept, out.elements(), Epilogue::default(), &mut Workspace::default())
            };
            multiply(&bytes).unwrap();
            let error = multiply(&bytes[1..]);
            assert!(matches!(error, Err(Error::Shape { .. })), "{error:?}");
            let _ = out.checked();
        }
    }
}

#[test]
fn what_cannot_be_kept_is_an_error() {
    let ctx = Context::serial();
    for format in
        [line(9, 16), BlockFormat::new(4, BlockShape::Tile(4)).unwrap(), line(4, 16).with_exponent(5, None).unwrap()]
    {
        assert_eq!(kept_bytes(&ctx, 8, 8, format), None, "{format}");
    }
    assert_eq!(kept_bytes(&ctx, 0, 8, line(4, 16)), None);
    for n in [1 << 30, 1 << 31, 1 << 40] {
        assert_eq!(kept_bytes(&ctx, n, n, line(4, 1)), None, "more bytes than can be counted");
    }
    let case = Case::draw(&mut TestRng(63), 20, Storage::Poisoned);
    let len = kept_bytes(&ctx, case.kept.lines(), case.kept.k(), case.kept.format).unwrap();
    for (axis, len) in [(case.kept.axis(), len - 1), (case.kept.axis(), len + 1), (2, len)] {
        let mut bytes = vec![0; len];
        let keep = Keep { axis, format: case.kept.format, mode: case.kept.mode, bytes: &mut bytes };
        let mut out = vec![7.0; case.a.lines() * case.w.lines()];
        let w = Right::Operand(case.w.operand());
        let (a, beside, mut workspace) =
            (case.a.operand(), Beside { keep: Some(keep), sums: None }, Workspace::default());
        let error = product_beside(&ctx, &a, beside, &w, &mut out, Epilogue::default(), &mut workspace);
        assert!(matches!(error, Err(Error::Shape { .. })), "{error:?}");
        assert!(out.iter().all(|&x| x == 7.0), "a write before an error");
    }
    for len in [case.a.lines() - 1, case.a.lines() + 1] {
        let (mut sums, mut out) = (vec![7.0; len], vec![7.0; case.a.lines() * case.w.lines()]);
        let (w, beside) = (Right::Operand(case.w.operand()), Beside { keep: None, sums: Some(&mut sums) });
        let (a, mut workspace) = (case.a.operand(), Workspace::default());
        let error = product_beside(&ctx, &a, beside, &w, &mut out, Epilogue::default(), &mut workspace);
        assert!(matches!(error, Err(Error::Shape { .. })), "{error:?}");
        assert!(sums.iter().chain(&out).all(|&x| x == 7.0), "a write before an error");
    }
}

#[test]
fn memcheck_keeping() {
    let mut rng = TestRng(64);
    let levels = Level::ALL.into_iter().filter(|level| level.is_available());
    let levels: Vec<_> = levels.map(|level| (level.name(), serial(Kernels::of(level)))).collect();
    for number in 0..25 {
        let case = Case::draw(&mut rng, 40, Storage::Bare);
        let expected = case.expected();
        for (name, ctx) in &levels {
            case.check(&case.run(ctx, &mut Workspace::default()).0, &expected, &|| format!("{name}: case {number}"));
        }
    }
}

#[test]
fn planes_are_kept_as_the_floats_that_they_came_from() {
    // Hunted: words that change their line or block where a register is moved at once: blocks that divide one, fill it
    // or outgrow it, last ones that are short, lines that fill panels or don't, blocks of zeros and of rare exponents.
    let mut rng = TestRng(66);
    for number in 0..150 {
        let block = pick(&mut rng, &[4, 8, 16, 20, 24, 32, 48, 64, 64, 96, 128, 320]);
        let lines = pick(&mut rng, &[1, 15, 16, 31, 32, 33, 64, 70, 100]);
        let k = block * rng.below(9) + rng.below(2 * block) + 1;
        let (bits, by_line) = (pick(&mut rng, &[2, 3, 4, 4, 4, 5, 6, 7, 8, 8, 8]), rng.below(2) == 0);
        let fill = pick(&mut rng, &Fill::ALL);
        let format = line(bits, block);
        let x = TestOperand::new((lines, k), by_line, format, fill, mode(Rounding::NearestEven, 0), rng.next_u64());
        let planes = x.planes(&Context::serial());
        for (name, ctx) in contexts() {
            let what = || format!("{name}: case {number}, {lines} × {k} in {format}, by line {by_line}, {fill:?}");
            let len = kept_bytes(&ctx, lines, k, format).unwrap();
            let [mut found, mut expected] = [0xA5, 0x5A].map(|byte| vec![byte; len]);
            keep(&ctx, &planes.operand(), &mut found).unwrap();
            keep(&ctx, &x.operand(), &mut expected).unwrap();
            // Panels hold other bytes than these only past the last line, which nobody reads.
            let read = |bytes: &[u8]| {
                let layout = PlaneLayout::new(format, &[lines, k], 1).unwrap();
                Kept { lines, k, format, bytes }.planes(&ctx, &layout).unwrap()
            };
            assert!(read(&found) == read(&expected), "{}", what());
            let a = TestOperand::new((3, k), true, format, Fill::Plain, mode(Rounding::NearestEven, 0), 7);
            let multiply = |bytes: &[u8]| {
                let mut out = vec![f32::NAN; 3 * lines];
                let kept = Right::Kept(Kept { lines, k, format, bytes });
                product(&ctx, &a.operand(), &kept, &mut out, Epilogue::default(), &mut Workspace::default()).unwrap();
                out
            };
            assert_same_bits(&multiply(&found), &multiply(&expected), lines, &what);
        }
    }
}

#[test]
fn what_no_encoder_writes_is_found_wherever_it_lies() {
    // Hunted: a forbidden code that is moved with its register unseen; a NaN block with codes.
    let mut rng = TestRng(67);
    for number in 0..60 {
        let (bits, block) = (pick(&mut rng, &[4, 8]), pick(&mut rng, &[16, 32, 64, 128]));
        let (lines, k) = (32 * (1 + rng.below(3)), 4 * block + block * rng.below(4) + 8);
        let format = line(bits, block);
        let x = TestOperand::new((lines, k), true, format, Fill::Plain, mode(Rounding::NearestEven, 0), 3);
        let good = x.planes(&Context::serial());
        let (row, element) = (rng.below(lines), rng.below(k));
        let b = element / block;
        let mut bad = good.planes.clone();
        let nan = number % 3 == 0;
        if nan {
            bad.exponents[row * k.div_ceil(block) + b] = 255;
        } else {
            let at = row * (good.planes.mantissas.len() / lines) + element * usize::from(bits) / 8;
            let byte = &mut bad.mantissas[at];
            *byte = if bits == 8 {
                0x80
            } else if element % 2 == 0 {
                *byte & 0xF0 | 8
            } else {
                *byte & 0x0F | 0x80
            };
        }
        for (name, ctx) in contexts() {
            let mut bytes = vec![0; kept_bytes(&ctx, lines, k, format).unwrap()];
            let operand =
                Operand::Planes { layout: &good.layout, exponents: &bad.exponents, mantissas: &bad.mantissas, axis: 1 };
            let error = keep(&ctx, &operand, &mut bytes);
            let place = format!("in block {b} of row {row}");
            assert!(
                matches!(&error, Err(Error::Code { found, .. }) if found.ends_with(&place)),
                "{name}: {lines} × {k} in {format}, {place}, NaN: {nan}: {error:?}"
            );
        }
    }
}
