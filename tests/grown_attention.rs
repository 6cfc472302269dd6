//! Attention over a text that grows against attention over the whole text so far, bit for bit, at every level.
//!
//! The bugs these hunt: a token's key in another's lane; a block of values that is closed too early, or encoded once too
//! often; an open block that starts sums anew; a row that sees tokens of its own piece behind it; what a NaN block, or
//! tokens that were forgotten, leave behind.

mod operands;

use hbfp::attention::{Attention, Grown, Workspace};
use hbfp::gemm::Coding;
use hbfp::parallel::Pool;
use hbfp::shape::FloatTensor;
use hbfp::testing::{Fill, Guarded, TestRng};
use hbfp::{BlockFormat, BlockShape, Context, ExponentRule, Rounding};
use operands::memory::{Placement, Storage, Tensor};
use operands::{ROUNDINGS, assert_same_bits, contexts, line, mode, pick};

/// Texts of `tokens` tokens: q, k [matrices, tokens, depth] and v [matrices, tokens, width].
struct Text {
    matrices: usize,
    tokens: usize,
    depth: usize,
    width: usize,
    x: [Vec<f32>; 3],
    scores: [Coding; 2],
    context: [Coding; 2],
}

fn coding(format: BlockFormat) -> Coding {
    Coding { format, mode: mode(Rounding::NearestEven, 0) }
}

impl Text {
    fn new([matrices, tokens, depth, width]: [usize; 4], format: BlockFormat, fills: [Fill; 3], seed: u64) -> Self {
        let sizes = [depth, depth, width];
        let x = [0, 1, 2].map(|i| fills[i].values(matrices * tokens * sizes[i], seed + i as u64));
        Self { matrices, tokens, depth, width, x, scores: [coding(format); 2], context: [coding(format); 2] }
    }

    /// Some tokens of q, k or v.
    fn piece(&self, i: usize, begin: usize, end: usize) -> Vec<f32> {
        let columns = [self.depth, self.depth, self.width][i];
        let rows = self.x[i].chunks_exact(columns).collect::<Vec<_>>();
        rows.chunks_exact(self.tokens).flat_map(|matrix| matrix[begin..end].concat()).collect()
    }

    fn shape(&self, i: usize, tokens: usize) -> [usize; 3] {
        [self.matrices, tokens, [self.depth, self.depth, self.width][i]]
    }

    /// Rows `begin` .. `end` of attention over the first `end` tokens.
    fn expected(&self, begin: usize, end: usize) -> Vec<f32> {
        let values = [0, 1, 2].map(|i| self.piece(i, 0, end));
        let [q, k, v] = [0, 1, 2].map(|i| FloatTensor::new(&values[i], &self.shape(i, end)).unwrap());
        let mut out = vec![0.0; self.matrices * end * self.width];
        Attention { q, k, v, mask: None, causal: true, scale: 0.3, dropout: None, scores: self.scores }
            .forward(&Context::serial(), self.context, &mut out, &mut Workspace::default())
            .unwrap();
        out.chunks_exact(end * self.width).flat_map(|matrix| matrix[begin * self.width..].to_vec()).collect()
    }

    fn extend(&self, grown: &mut Grown, ctx: &Context<'_>, begin: usize, end: usize, placement: Placement) -> Vec<f32> {
        let tensors = [0, 1, 2].map(|i| {
            Tensor::new(&self.piece(i, begin, end), &self.shape(i, end - begin), placement, Storage::Poisoned)
        });
        let mut out = Guarded::new(self.matrices * (end - begin) * self.width, f32::NAN);
        let [q, k, v] = [0, 1, 2].map(|i| tensors[i].view());
        grown.attend(ctx, [&q, &k, &v], 0.3, out.elements(), &mut Workspace::default()).unwrap();
        out.checked().to_vec()
    }

    #[track_caller]
    fn check(&self, levels: &[(&str, Context<'_>)], bounds: &[usize], placement: Placement, what: &str) {
        let mut all: Vec<Grown> =
            levels.iter().map(|(_, ctx)| Grown::new(ctx, self.scores, self.context).unwrap()).collect();
        for piece in bounds.windows(2) {
            let (begin, end) = (piece[0], piece[1]);
            let expected = self.expected(begin, end);
            for ((name, ctx), grown) in levels.iter().zip(&mut all) {
                let found = self.extend(grown, ctx, begin, end, placement);
                assert_same_bits(&found, &expected, self.width, &|| format!("{name}: {what}, tokens {begin} to {end}"));
                assert_eq!(grown.length(), end);
            }
        }
    }
}

#[test]
fn pieces_of_any_length_have_the_bits_of_the_whole() {
    let levels = contexts();
    for seed in 0..60 {
        let mut rng = TestRng(seed);
        let sizes = [1 + rng.below(3), 1 + rng.below(150), 1 + rng.below(80), 1 + rng.below(80)];
        let fills = [0, 1, 2].map(|_| pick(&mut rng, &[Fill::Plain, Fill::Plain, Fill::Wide, Fill::Extreme]));
        let mut text = Text::new(sizes, line(4, 64), fills, 1000 + seed);
        for codings in [&mut text.scores, &mut text.context] {
            let block = pick(&mut rng, &[5, 16, 32, 48, 64, 64, 100]);
            for coding in codings {
                let rule = pick(&mut rng, &[ExponentRule::MaxExponent, ExponentRule::Ceil, ExponentRule::NoClip]);
                let bits = pick(&mut rng, &[4, 4, 6, 8, 2]);
                coding.format = BlockFormat::new(bits, BlockShape::Line(block)).unwrap().with_rule(rule);
                coding.mode.rounding = pick(&mut rng, &ROUNDINGS[..3]);
            }
        }
        let mut bounds = vec![0];
        while let Some(&last) = bounds.last().filter(|&&last| last < text.tokens) {
            let step = pick(&mut rng, &[1, 1, 2, 7, 33, 64, 90]);
            bounds.push((last + step).min(text.tokens));
        }
        let placements: Vec<_> = Placement::ALL.into_iter().filter(|placement| !placement.repeated).collect();
        let placement = pick(&mut rng, &placements);
        text.check(&levels, &bounds, placement, &format!("seed {seed}, {sizes:?}"));
    }
}

#[test]
fn a_value_that_is_not_finite_reaches_what_it_reaches_in_the_whole() {
    let levels = contexts();
    for seed in 0..40 {
        let mut rng = TestRng(seed);
        let mut text = Text::new([2, 100, 16, 40], line(pick(&mut rng, &[4, 8]), 32), [Fill::Plain; 3], seed);
        let i = rng.below(3);
        let at = rng.below(text.x[i].len());
        text.x[i][at] = pick(&mut rng, &[f32::NAN, f32::INFINITY, f32::MAX, 3e38, 1e-42]);
        text.check(&levels, &[0, 1, 40, 41, 64, 65, 100], Placement::DENSE, &format!("seed {seed}"));
    }
}

#[test]
fn tokens_that_are_forgotten_leave_nothing_behind() {
    let (text, other) = ([3, 100, 24, 40], [3, 100, 24, 40]);
    let [text, other] =
        [(text, 1), (other, 9)].map(|(sizes, seed)| Text::new(sizes, line(4, 32), [Fill::Plain; 3], seed));
    for (name, ctx) in contexts() {
        let mut grown = Grown::new(&ctx, text.scores, text.context).unwrap();
        text.extend(&mut grown, &ctx, 0, 70, Placement::DENSE);
        let bytes = grown.bytes();
        for length in [70, 67, 64, 32] {
            let mut copy = grown.clone();
            other.extend(&mut copy, &ctx, 70, 100, Placement::DENSE);
            if length < 64 {
                copy.truncate(64).unwrap();
            }
            copy.truncate(if length > 64 { 64 } else { length }).unwrap();
            let begin = copy.length();
            let found = text.extend(&mut copy, &ctx, begin, 70, Placement::DENSE);
            assert_same_bits(&found, &text.expected(begin, 70), text.width, &|| format!("{name}: from {begin}"));
            assert_eq!(copy.bytes(), bytes, "{name}");
            let mut open = grown.clone();
            if length >= 64 {
                open.truncate(length).unwrap();
                let found = text.extend(&mut open, &ctx, length, 90, Placement::DENSE);
                assert_same_bits(&found, &text.expected(length, 90), text.width, &|| format!("{name}: at {length}"));
            }
        }
        assert!(grown.truncate(71).is_err() && grown.truncate(33).is_err(), "{name}");
        grown.truncate(0).unwrap();
        assert_eq!((grown.length(), grown.bytes()), (0, 0), "{name}");
        let fewer = Text::new([1, 5, 8, 8], line(4, 32), [Fill::Plain; 3], 3);
        let found = fewer.extend(&mut grown, &ctx, 0, 5, Placement::DENSE);
        assert_same_bits(&found, &fewer.expected(0, 5), 8, &|| name.to_owned());
    }
}

#[test]
fn four_bits_take_four_bits_and_an_exponent_a_block() {
    for (name, ctx) in contexts() {
        let text = Text::new([2, 128, 64, 64], line(4, 64), [Fill::Plain; 3], 5);
        let mut grown = Grown::new(&ctx, text.scores, text.context).unwrap();
        text.extend(&mut grown, &ctx, 0, 128, Placement::DENSE);
        assert_eq!(grown.bytes() * 8, 2 * 2 * 128 * 64 * 33 / 8, "{name}");
    }
}

#[test]
fn threads_do_not_matter() {
    let text = Text::new([6, 200, 32, 48], line(4, 64), [Fill::Plain; 3], 5);
    let pool = Pool::new();
    for (name, ctx) in contexts() {
        let ctx = Context { team: &pool, threads: 3, ..ctx };
        text.check(&[(name, ctx)], &[0, 100, 101, 180, 200], Placement::DENSE, "three threads");
    }
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let ctx = Context::serial();
    let text = Text::new([2, 40, 16, 16], line(4, 16), [Fill::Plain; 3], 5);
    let mut random = text.scores;
    random[0].mode.rounding = Rounding::Stochastic;
    assert!(Grown::new(&ctx, random, text.context).is_err());
    assert!(Grown::new(&ctx, text.scores, [coding(line(12, 16)); 2]).is_err());
    let tile = BlockFormat::new(4, BlockShape::Tile(16)).unwrap();
    assert!(Grown::new(&ctx, text.scores, [coding(tile); 2]).is_err());
    let mut grown = Grown::new(&ctx, text.scores, text.context).unwrap();
    text.extend(&mut grown, &ctx, 0, 20, Placement::DENSE);
    let zeros = vec![0.0; 2000];
    for (q, k, v, len) in [
        (&[2, 3, 16][..], &[2, 3, 16][..], &[2, 4, 16][..], 96),
        (&[2, 3, 16], &[2, 3, 8], &[2, 3, 16], 96),
        (&[1, 3, 16], &[1, 3, 16], &[1, 3, 16], 48),
        (&[2, 3, 8], &[2, 3, 8], &[2, 3, 16], 96),
        (&[2, 3, 16], &[2, 3, 16], &[2, 3, 8], 48),
        (&[2, 0, 16], &[2, 0, 16], &[2, 0, 16], 0),
        (&[2, 3, 16], &[2, 3, 16], &[2, 3, 16], 95),
        (&[16], &[16], &[16], 16),
    ] {
        let [q, k, v] = [q, k, v].map(|shape| FloatTensor::new(&zeros[..shape.iter().product()], shape).unwrap());
        let found = grown.attend(&ctx, [&q, &k, &v], 0.3, &mut vec![0.0; len], &mut Workspace::default());
        assert!(found.is_err(), "{:?} {:?} {:?}", q.shape(), k.shape(), v.shape());
    }
    let found = text.extend(&mut grown, &ctx, 20, 40, Placement::DENSE);
    assert_same_bits(&found, &text.expected(20, 40), 16, &|| "after what was refused".to_owned());
}
