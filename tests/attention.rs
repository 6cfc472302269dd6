//! Fused attention against its definition, the products and the softmax one after the other with all matrices in
//! memory, bit for bit: at every level, on one thread and on several.
//!
//! The bugs these hunt: random bits of a strip instead of those of the whole matrix; blocks along the queries cut by
//! strips; keys left out behind a causal mask although something there is NaN; padding of a strip that takes part;
//! buffers that remember a larger call; a backward pass that drops other elements than the forward pass did.

mod operands;

use hbfp::attention::{Attention, Dropout, Gradients, Softmax, Workspace, softmax_backward};
use hbfp::gemm::{self, Coding, Epilogue, Operand, Right};
use hbfp::parallel::Pool;
use hbfp::shape::FloatTensor;
use hbfp::sums::column_sums;
use hbfp::testing::{Fill, Guarded, TestRng, all_kernels, models};
use hbfp::{BlockFormat, BlockShape, Context, Error, ExponentRule, Kernels, Rounding};
use operands::memory::{Placement, Storage, Tensor};
use operands::{ROUNDINGS, assert_same_bits, at_scale, contexts, line, mode, pick};

/// Which gradients are asked for: of q, k and v.
type Asked = [bool; 3];
const ALL: Asked = [true; 3];

/// Output and gradients of q, k and v.
type Results = [Vec<f32>; 4];

/// Everything that attention depends on. `groups` matrices of keys and values, each shared by several of queries.
struct Case {
    groups: usize,
    shared: usize,
    rows: usize,
    columns: usize,
    depth: usize,
    width: usize,
    causal: bool,
    scale: f32,
    /// [groups, shared, rows, depth]
    q: Tensor,
    /// [groups, 1, columns, depth] and [groups, 1, columns, width]
    k: Tensor,
    v: Tensor,
    /// [groups, shared, rows, width]
    output: Tensor,
    /// [groups, shared, rows, columns], each of them or 1.
    mask: Option<Tensor>,
    dropout: Option<Dropout>,
    scores: [Coding; 2],
    context: [Coding; 2],
    values: [Coding; 2],
    weights: [Coding; 2],
    queries: [Coding; 2],
    keys: [Coding; 2],
}

fn dense(shape: [usize; 4], fill: Fill, seed: u64) -> Tensor {
    Tensor::new(&fill.values(shape.iter().product(), seed), &shape, Placement::DENSE, Storage::Poisoned)
}

/// The product of two tensors, each reduced along its axis.
fn multiply(
    ctx: &Context<'_>,
    (a, a_axis): (&FloatTensor<'_>, usize),
    (b, b_axis): (&FloatTensor<'_>, usize),
    codings: [Coding; 2],
    len: usize,
) -> Vec<f32> {
    let [left, right] = codings;
    let a = Operand::Floats { x: a.clone(), axis: a_axis, format: left.format, mode: left.mode };
    let b = Right::Operand(Operand::Floats { x: b.clone(), axis: b_axis, format: right.format, mode: right.mode });
    let mut out = vec![0.0; len];
    gemm::product(ctx, &a, &b, &mut out, Epilogue::default(), &mut gemm::Workspace::default()).unwrap();
    out
}

impl Case {
    /// Numbers of one magnitude under a causal mask, to nearest even in one format; tests change what they are about.
    fn new([groups, shared, rows, columns, depth, width]: [usize; 6], format: BlockFormat, seed: u64) -> Self {
        let codings =
            |streams: [u64; 2]| streams.map(|stream| Coding { format, mode: mode(Rounding::NearestEven, stream) });
        Self {
            groups,
            shared,
            rows,
            columns,
            depth,
            width,
            causal: true,
            scale: 0.3,
            q: dense([groups, shared, rows, depth], Fill::Plain, seed),
            k: dense([groups, 1, columns, depth], Fill::Plain, seed + 1),
            v: dense([groups, 1, columns, width], Fill::Plain, seed + 2),
            output: dense([groups, shared, rows, width], Fill::Plain, seed + 3),
            mask: None,
            dropout: None,
            scores: codings([6, 7]),
            context: codings([8, 9]),
            values: codings([14, 11]),
            weights: codings([10, 15]),
            queries: codings([12, 15]),
            keys: codings([13, 15]),
        }
    }

    fn tensors(&self) -> [FloatTensor<'_>; 4] {
        let Self { groups, shared, columns, depth, width, .. } = *self;
        [
            self.q.view(),
            self.k.expand(&[groups, shared, columns, depth]),
            self.v.expand(&[groups, shared, columns, width]),
            self.output.view(),
        ]
    }

    fn whole(&self) -> [usize; 4] {
        [self.groups, self.shared, self.rows, self.columns]
    }

    /// Elements of the results.
    fn sizes(&self) -> [usize; 4] {
        let matrices = self.groups * self.shared;
        let (queries, keys) = (matrices * self.rows, matrices * self.columns);
        [queries * self.width, queries * self.depth, keys * self.depth, keys * self.width]
    }

    fn by_definition(&self) -> Results {
        let ctx = Context::serial();
        let whole = self.whole();
        let ([q, k, v, output], sizes) = (self.tensors(), self.sizes());
        let mut p = multiply(&ctx, (&q, 3), (&k, 3), self.scores, whole.iter().product());
        let mask = self.mask.as_ref().map(|mask| mask.expanded_values(&whole));
        let (rows, columns, causal, scale) = (self.rows, self.columns, self.causal, self.scale);
        Softmax { rows, columns, scale, causal, mask: mask.as_deref() }.apply(&ctx, &mut p).unwrap();
        let mut ds = multiply(&ctx, (&output, 3), (&v, 3), self.weights, p.len());
        let mut dropped = p.clone();
        if let Some(dropout) = &self.dropout {
            dropout.apply(&ctx, &mut dropped, columns).unwrap();
            dropout.apply(&ctx, &mut ds, columns).unwrap();
        }
        softmax_backward(&ctx, &p, &mut ds, columns, scale).unwrap();
        let p = dropped;
        let (p, ds) = (FloatTensor::new(&p, &whole).unwrap(), FloatTensor::new(&ds, &whole).unwrap());
        [
            multiply(&ctx, (&p, 3), (&v, 2), self.context, sizes[0]),
            multiply(&ctx, (&ds, 3), (&k, 2), self.queries, sizes[1]),
            multiply(&ctx, (&ds, 2), (&q, 2), self.keys, sizes[2]),
            multiply(&ctx, (&p, 2), (&output, 2), self.values, sizes[3]),
        ]
    }

    /// P (dP − σ), summed where the mask, of which the last dimension is all columns, was broadcast.
    fn mask_gradient_by_definition(&self, shape: [usize; 4], summed: bool) -> Vec<f32> {
        let ctx = Context::serial();
        let whole = self.whole();
        let [q, k, v, output] = self.tensors();
        let mut p = multiply(&ctx, (&q, 3), (&k, 3), self.scores, whole.iter().product());
        let mask = self.mask.as_ref().map(|mask| mask.expanded_values(&whole));
        let (rows, columns, causal, scale) = (self.rows, self.columns, self.causal, self.scale);
        Softmax { rows, columns, scale, causal, mask: mask.as_deref() }.apply(&ctx, &mut p).unwrap();
        let mut ds = multiply(&ctx, (&output, 3), (&v, 3), self.weights, p.len());
        if let Some(dropout) = &self.dropout {
            dropout.apply(&ctx, &mut ds, columns).unwrap();
        }
        softmax_backward(&ctx, &p, &mut ds, columns, 1.0).unwrap();
        if !summed {
            return ds;
        }
        // The rows of each sum, in order.
        let mut of_sum = vec![Vec::new(); shape[..3].iter().product()];
        for (row, values) in ds.chunks_exact(columns).enumerate() {
            let place = [row / rows / self.shared, row / rows % self.shared, row % rows];
            let [a, b, c] = std::array::from_fn(|i| if shape[i] == 1 { 0 } else { place[i] });
            of_sum[(a * shape[1] + b) * shape[2] + c].extend_from_slice(values);
        }
        let mut out = vec![0.0; of_sum.len() * columns];
        for (rows, out) in of_sum.iter().zip(out.chunks_exact_mut(columns)) {
            column_sums(&ctx, rows, out).unwrap();
        }
        out
    }

    fn attention(&self) -> (Attention<'_>, Gradients<'_>) {
        let [q, k, v, output] = self.tensors();
        let mask = self.mask.as_ref().map(|mask| mask.expand(&self.whole()));
        let Self { causal, scale, dropout, scores, values, weights, queries, keys, .. } = *self;
        (
            Attention { q, k, v, mask, causal, scale, dropout, scores },
            Gradients { output, values, weights, queries, keys },
        )
    }

    /// Gradients that are not asked for are empty.
    fn fused(&self, ctx: &Context<'_>, asked: Asked, workspace: &mut Workspace) -> Results {
        let (attention, gradients) = self.attention();
        let [mut out, mut dq, mut dk, mut dv] = self.sizes().map(|n| Guarded::new(n, f32::NAN));
        attention.forward(ctx, self.context, out.elements(), workspace).unwrap();
        let [q, k, v] = asked;
        let (dq_out, dk_out) = (q.then(|| dq.elements()), k.then(|| dk.elements()));
        attention.backward(ctx, &gradients, dq_out, dk_out, v.then(|| dv.elements()), workspace).unwrap();
        let gradient = |asked: bool, x: &Guarded| if asked { x.checked().to_vec() } else { Vec::new() };
        [out.checked().to_vec(), gradient(q, &dq), gradient(k, &dk), gradient(v, &dv)]
    }

    #[track_caller]
    fn check(&self, levels: &[(&str, Context<'_>)], asked: Asked, what: &dyn Fn() -> String) {
        let expected = self.by_definition();
        for (name, ctx) in levels {
            let found = self.fused(ctx, asked, &mut Workspace::default());
            self.compare(&found, &expected, asked, &|| format!("{name}: {}", what()));
        }
    }

    #[track_caller]
    fn compare(&self, found: &Results, expected: &Results, asked: Asked, what: &dyn Fn() -> String) {
        let columns = [self.width, self.depth, self.depth, self.width];
        for (i, name) in ["output", "gradient of q", "gradient of k", "gradient of v"].into_iter().enumerate() {
            if i == 0 || asked[i - 1] {
                assert_same_bits(&found[i], &expected[i], columns[i], &|| format!("{name}, {}", what()));
            }
        }
    }
}

/// None, or a share between nothing and everything.
fn draw_dropout(rng: &mut TestRng) -> Option<Dropout> {
    let dropped = pick(rng, &[0, 0, 1, 6554, 32768, 60000, 65535, 65536]);
    (dropped > 0).then(|| Dropout::new(dropped, rng.next_u64()).unwrap())
}

/// Formats of the operands of each product, cut alike, and roundings of each operand.
fn draw_codings(rng: &mut TestRng, case: &mut Case) {
    let blocks = [5, 16, 32, 48, 64, 64, 100];
    let along_queries = pick(rng, &blocks);
    let mut draw = |codings: &mut [Coding; 2], block: usize| {
        for coding in codings {
            let rule = pick(rng, &[ExponentRule::MaxExponent, ExponentRule::Ceil, ExponentRule::NoClip]);
            let bits = pick(rng, &[4, 4, 6, 8, 2]);
            coding.format = BlockFormat::new(bits, BlockShape::Line(block)).unwrap().with_rule(rule);
            coding.mode.rounding = pick(rng, &ROUNDINGS);
        }
    };
    draw(&mut case.values, along_queries);
    draw(&mut case.keys, along_queries);
    let mut block = TestRng(along_queries as u64 + case.rows as u64);
    for codings in [&mut case.scores, &mut case.context, &mut case.weights, &mut case.queries] {
        draw(codings, pick(&mut block, &blocks));
    }
}

#[test]
fn equals_the_definition_with_everything_drawn_at_random() {
    let levels = contexts();
    for seed in 0..120 {
        let mut rng = TestRng(seed);
        let length = |rng: &mut TestRng, most: usize| 1 + rng.below(most);
        let (rows, columns) = match rng.below(3) {
            0 => (length(&mut rng, 20), length(&mut rng, 20)),
            1 => {
                let n = length(&mut rng, 200);
                (n, n)
            }
            _ => (length(&mut rng, 150), length(&mut rng, 200)),
        };
        let sizes = [1 + rng.below(2), 1 + rng.below(3), rows, columns, length(&mut rng, 40), length(&mut rng, 70)];
        let mut case = Case::new(sizes, line(4, 64), 1000 + seed);
        draw_codings(&mut rng, &mut case);
        case.causal = rng.below(2) == 0;
        case.scale = pick(&mut rng, &[0.125, 0.3, 1.0, -0.5, 1e-3, 20.0]);
        let fill = |rng: &mut TestRng| pick(rng, &[Fill::Plain, Fill::Plain, Fill::Plain, Fill::Wide, Fill::Extreme]);
        let placements: Vec<_> = Placement::ALL.into_iter().filter(|placement| !placement.repeated).collect();
        for x in [&mut case.q, &mut case.k, &mut case.v, &mut case.output] {
            let count = x.shape().iter().product();
            let values = fill(&mut rng).values(count, rng.next_u64());
            *x = Tensor::new(&values, x.shape(), pick(&mut rng, &placements), Storage::Poisoned);
        }
        if rng.below(2) == 0 {
            let shape = case.whole().map(|n| if rng.below(2) == 0 { n } else { 1 });
            let mut values = Fill::Plain.values(shape.iter().product(), rng.next_u64());
            for x in &mut values {
                if rng.below(4) == 0 {
                    *x = f32::NEG_INFINITY;
                }
            }
            case.mask = Some(Tensor::new(&values, &shape, pick(&mut rng, &placements), Storage::Poisoned));
        }
        let asked = pick(&mut rng, &[ALL, ALL, ALL, [true, false, false], [false, true, false], [false, false, true]]);
        case.dropout = draw_dropout(&mut rng);
        let causal = case.causal;
        case.check(&levels, asked, &|| format!("seed {seed}: sizes {sizes:?}, causal {causal}, asked {asked:?}"));
    }
}

#[test]
fn gradients_of_masks_are_the_sums_of_the_definition() {
    let (levels, pool) = (contexts(), Pool::new());
    let mut workspace = Workspace::default();
    for seed in 0..60 {
        let mut rng = TestRng(seed);
        let length = |rng: &mut TestRng, most: usize| 1 + rng.below(most);
        // More than 64 matrices, so that sums have several blocks; or more rows than a segment.
        let sizes = match rng.below(3) {
            0 => [length(&mut rng, 3), 60 + rng.below(30), length(&mut rng, 9), length(&mut rng, 20), 8, 5],
            1 => [length(&mut rng, 2), 1, 250 + rng.below(80), length(&mut rng, 70), 8, 5],
            _ => [length(&mut rng, 3), length(&mut rng, 3), length(&mut rng, 70), length(&mut rng, 40), 20, 24],
        };
        let mut case = Case::new(sizes, line(4, 64), 1000 + seed);
        draw_codings(&mut rng, &mut case);
        case.causal = rng.below(3) == 0;
        case.dropout = draw_dropout(&mut rng);
        let mut shape = case.whole();
        shape[..3].iter_mut().filter(|_| rng.below(2) == 0).for_each(|n| *n = 1);
        let mut values = Fill::Plain.values(shape.iter().product(), rng.next_u64());
        values.iter_mut().filter(|_| rng.below(5) == 0).for_each(|x| *x = f32::NEG_INFINITY);
        case.mask = Some(Tensor::new(&values, &shape, Placement::DENSE, Storage::Poisoned));
        let summed = shape != case.whole() || rng.below(2) == 0;
        let expected = case.mask_gradient_by_definition(shape, summed);
        let (attention, gradients) = case.attention();
        let more = [2, 3].map(|threads| ("threads", Context { kernels: Kernels::best(), team: &pool, threads }));
        for (name, ctx) in levels.iter().chain(&more) {
            let mut out = Guarded::new(expected.len(), f32::NAN);
            let Gradients { output, weights, .. } = &gradients;
            attention.mask_gradient(ctx, output, *weights, &shape, summed, out.elements(), &mut workspace).unwrap();
            let what = || format!("{name}: seed {seed}, sizes {sizes:?}, mask {shape:?}, summed {summed}");
            assert_same_bits(out.checked(), &expected, case.columns, &what);
        }
    }
}

#[test]
fn a_mask_that_does_not_fit_has_no_gradient() {
    let (_, kernels) = all_kernels()[0];
    let ctx = operands::serial(kernels);
    let case = Case::new([2, 1, 6, 7, 8, 9], line(4, 64), 1);
    let (attention, gradients) = case.attention();
    for (shape, summed) in
        [(&[2, 1, 6, 1][..], true), (&[2, 3, 6, 7], true), (&[2, 6, 7], true), (&[1, 1, 6, 7], false)]
    {
        let mut out = vec![0.0; shape.iter().product()];
        let Gradients { output, weights, .. } = &gradients;
        let workspace = &mut Workspace::default();
        let error = attention.mask_gradient(&ctx, output, *weights, shape, summed, &mut out, workspace).unwrap_err();
        assert!(error.to_string().contains("a mask of shape"), "{error}");
    }
}

#[test]
fn one_value_that_is_not_finite_reaches_what_it_reaches_in_the_definition() {
    let levels = contexts();
    for seed in 0..100 {
        let mut rng = TestRng(seed);
        let n = 65 + rng.below(100);
        let mut case = Case::new([1, 1, n, n, 16, 20], line(pick(&mut rng, &[4, 8]), pick(&mut rng, &[16, 64])), seed);
        let value = pick(&mut rng, &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 3e38, -1e30]);
        let which = rng.below(5);
        if which == 4 {
            // In the mask: a row that is NaN although all operands are finite.
            let mut values = vec![0.0; n * n];
            values[rng.below(n * n)] = value;
            case.mask = Some(Tensor::new(&values, &[1, 1, n, n], Placement::DENSE, Storage::Poisoned));
        } else {
            let x = [&mut case.q, &mut case.k, &mut case.v, &mut case.output].into_iter().nth(which).unwrap();
            let mut values = x.values();
            let at = rng.below(values.len());
            values[at] = value;
            *x = Tensor::new(&values, x.shape(), Placement::DENSE, Storage::Poisoned);
        }
        let asked = pick(&mut rng, &[ALL, [true, false, false], [false, true, false], [false, false, true]]);
        case.dropout = draw_dropout(&mut rng);
        case.check(&levels, asked, &|| format!("seed {seed}: {value} in tensor {which} of {n} rows, asked {asked:?}"));
    }
}

#[test]
fn scales_that_overflow_or_are_nan_are_no_special_case() {
    let levels = contexts();
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38, -1e38, 0.0, -0.0] {
        // The last keys are seen by no row.
        let mut case = Case::new([1, 1, 130, 200, 16, 16], line(6, 16), 5);
        case.scale = scale;
        case.check(&levels, ALL, &|| format!("scale {scale}"));
        // Scores of one sign: rows of P are zeros, or NaN, as a whole.
        case.q = constant([1, 1, 130, 16], |_| 1.0);
        case.k = constant([1, 1, 200, 16], |_| -1.0);
        case.check(&levels, ALL, &|| format!("negative scores, scale {scale}"));
    }
}

/// A tensor whose rows hold one value each.
fn constant(shape: [usize; 4], value: impl Fn(usize) -> f32) -> Tensor {
    let values: Vec<f32> = (0..shape.iter().product()).map(|i| value(i / shape[3] % shape[2])).collect();
    Tensor::new(&values, &shape, Placement::DENSE, Storage::Poisoned)
}

#[test]
fn sums_of_dp_that_could_overflow_keep_all_keys() {
    // The largest values of the fast range. dP is infinite only for the last keys, of which the first strips see none.
    let largest = at_scale(127, 52);
    let mut case = Case::new([1, 1, 130, 130, 16, 1200], line(8, 64), 5);
    case.weights = case.weights.map(|coding| Coding { format: line(8, 256), ..coding });
    case.v = constant([1, 1, 130, 1200], |row| if row > 90 { largest } else { 1.0 });
    case.output = constant([1, 1, 130, 1200], |_| largest);
    let expected = case.by_definition();
    assert!(expected[1][0].is_nan(), "the case hunts nothing");
    case.check(&contexts(), ALL, &|| "sums at the end of the range".to_owned());
}

#[test]
fn what_dropout_multiplies_by_could_overflow_too() {
    let largest = at_scale(127, 52);
    let mut case = Case::new([1, 1, 130, 130, 16, 100], line(8, 64), 5);
    case.v = constant([1, 1, 130, 100], |row| if row > 90 { largest } else { 1.0 });
    case.output = constant([1, 1, 130, 100], |_| largest);
    assert!(case.by_definition().iter().flatten().all(|x| !x.is_nan()), "without dropout no sum overflows");
    case.dropout = Some(Dropout::new(61440, 3).unwrap());
    assert!(case.by_definition()[1].iter().any(|x| x.is_nan()), "the case hunts nothing");
    case.check(&contexts(), ALL, &|| "sixteen times what is kept".to_owned());
}

#[test]
fn dropout_is_that_of_each_elements_place() {
    // 37 columns end within a counter and within a register of every level.
    let (rows, columns, dropped, seed) = (41, 37, 20000, 0x0123_4567_89AB_CDEF);
    let x = Fill::Plain.values(rows * columns, 4);
    let source = hbfp::rng::Seed { seed, stream: 0 };
    let factor = 65536.0 / 45536.0;
    let expected: Vec<f32> = x
        .iter()
        .enumerate()
        .map(|(i, &x)| {
            let kept = u32::from(source.bits((i / columns) as u32, i % columns)) >= dropped;
            if kept { x * factor } else { 0.0 }
        })
        .collect();
    for (name, ctx) in contexts() {
        let mut found = Guarded::new(x.len(), 0.0);
        found.elements().copy_from_slice(&x);
        Dropout::new(dropped, seed).unwrap().apply(&ctx, found.elements(), columns).unwrap();
        assert_same_bits(found.checked(), &expected, columns, &|| name.to_owned());
    }
    assert!(Dropout::new(65537, seed).is_err());
}

#[test]
fn rows_that_see_nothing_are_zero() {
    for (name, ctx) in contexts() {
        let mut case = Case::new([1, 2, 70, 40, 16, 8], line(4, 64), 7);
        case.causal = false;
        case.mask = Some(Tensor::new(&[f32::NEG_INFINITY], &[1, 1, 1, 1], Placement::DENSE, Storage::Poisoned));
        let found = case.fused(&ctx, ALL, &mut Workspace::default());
        assert!(found.iter().flatten().all(|x| x.to_bits() == 0), "{name}");
    }
}

#[test]
fn threads_and_what_a_workspace_held_before_do_not_matter() {
    let (large, small) = ([1, 2, 200, 300, 24, 40], [2, 1, 130, 131, 40, 24]);
    let cases: Vec<Case> = [large, small, large]
        .into_iter()
        .map(|sizes| {
            let mut case = Case::new(sizes, line(4, 64), 21);
            case.dropout = Some(Dropout::new(6554, 99).unwrap());
            for codings in [&mut case.scores, &mut case.context, &mut case.values] {
                codings.iter_mut().for_each(|coding| coding.mode.rounding = Rounding::Stochastic);
            }
            for codings in [&mut case.weights, &mut case.queries, &mut case.keys] {
                codings.iter_mut().for_each(|coding| coding.mode.rounding = Rounding::Stochastic);
            }
            case
        })
        .collect();
    let expected: Vec<Results> = cases.iter().map(Case::by_definition).collect();
    let pool = Pool::new();
    let best: [(&str, &'static Kernels); 2] = [("best", Kernels::best()), ("model", models::avx512vnni())];
    for (name, kernels) in best {
        for threads in [1, 2, 3, 7] {
            let ctx = Context { kernels, team: &pool, threads };
            let mut workspace = Workspace::default();
            for (case, expected) in cases.iter().zip(&expected) {
                let found = case.fused(&ctx, ALL, &mut workspace);
                case.compare(&found, expected, ALL, &|| format!("{name}, {threads} threads"));
            }
        }
    }
}

/// A read past an operand ends the tests with SIGSEGV.
#[cfg(unix)]
#[test]
fn reads_nothing_beside_its_operands() {
    let levels = contexts();
    for storage in [Storage::FencedAfter, Storage::FencedBefore] {
        for turned in [false, true] {
            let mut case = Case::new([1, 2, 37, 45, 19, 21], line(4, 16), 7);
            case.mask = Some(dense([1, 2, 37, 45], Fill::Plain, 8));
            case.dropout = Some(Dropout::new(6554, 9).unwrap());
            let Case { q, k, v, output, mask, .. } = &mut case;
            for x in [q, k, v, output, mask.as_mut().unwrap()] {
                *x = Tensor::new(&x.values(), x.shape(), Placement { turned, ..Placement::DENSE }, storage);
            }
            case.check(&levels, ALL, &|| format!("{storage:?}, turned {turned}"));
        }
    }
}

#[test]
fn a_workspace_holds_strips_and_no_matrix() {
    // L x S would be 16 MiB.
    let mut case = Case::new([1, 1, 2048, 2048, 16, 16], line(4, 64), 3);
    case.dropout = Some(Dropout::new(6554, 9).unwrap());
    let mut workspace = Workspace::default();
    case.fused(&Context::serial(), ALL, &mut workspace);
    assert!(workspace.bytes() < 4 << 20, "{} bytes", workspace.bytes());
}

#[test]
fn what_does_not_fit_is_refused() {
    let (_, kernels) = all_kernels()[0];
    let ctx = operands::serial(kernels);
    let good = || Case::new([1, 1, 6, 7, 8, 9], line(4, 64), 1);
    let refused = |case: &Case, expected: &str| {
        let (attention, gradients) = case.attention();
        let mut out = vec![0.0; 6 * 9];
        let forward = attention.forward(&ctx, case.context, &mut out, &mut Workspace::default());
        let backward = attention.backward(&ctx, &gradients, None, None, None, &mut Workspace::default());
        let error = forward.and(backward).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        error
    };
    let mut case = good();
    case.k = dense([1, 1, 7, 5], Fill::Plain, 1);
    case.depth = 5;
    assert!(matches!(refused(&case, "[.., S, E]"), Error::Shape { .. }));
    let mut case = good();
    case.output = dense([1, 1, 5, 9], Fill::Plain, 1);
    refused(&case, "a gradient [.., L, Ev]");
    let mut case = good();
    case.context[1].format = line(12, 64);
    assert!(matches!(refused(&case, "8 bits or fewer"), Error::Format { .. }));
    let mut case = good();
    case.scores[0].format = BlockFormat::new(4, BlockShape::Tile(8)).unwrap();
    refused(&case, "blocks in lines");
    let mut case = good();
    case.queries[0].format = line(4, 3);
    refused(&case, "equal block boundaries");
    let mut case = good();
    case.keys = case.keys.map(|coding| Coding { format: line(4, 3), ..coding });
    refused(&case, "dV and dK");
}
