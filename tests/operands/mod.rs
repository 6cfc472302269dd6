//! Operands of test products: tensors anywhere in memory, what the slow definition makes of them, and their comparison
//! with every level.
//!
//! What a test expects is computed once, and all levels are held against it: the definition is slower than any of them.
#![allow(dead_code, reason = "every test file takes what it needs")]

pub mod memory;

use hbfp::encode::{Planes, RoundingMode, encode};
use hbfp::format::NAN_EXPONENT;
use hbfp::gemm::{Epilogue, Operand, Packed, Right, Workspace, prepack, product};
use hbfp::reference::{self, Encoded};
use hbfp::rng::Seed;
use hbfp::shape::PlaneLayout;
use hbfp::testing::{Fill, Guarded, TestRng, all_kernels};
use hbfp::{BlockFormat, BlockShape, Context, Kernels, Rounding};
use memory::{Placement, Storage, Tensor};

pub const ROUNDINGS: [Rounding; 4] =
    [Rounding::NearestEven, Rounding::NearestAway, Rounding::TowardZero, Rounding::Stochastic];

/// One of `items`.
pub fn pick<T: Copy>(rng: &mut TestRng, items: &[T]) -> T {
    items[rng.below(items.len())]
}

pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

pub fn mode(rounding: Rounding, stream: u64) -> RoundingMode {
    RoundingMode { rounding, seed: Seed { seed: 0x0123_4567_89AB_CDEF, stream } }
}

pub fn line(bits: u8, block: usize) -> BlockFormat {
    BlockFormat::new(bits, BlockShape::Line(block)).unwrap()
}

/// The kernels of every level, on the calling thread.
pub fn contexts() -> Vec<(&'static str, Context<'static>)> {
    all_kernels().into_iter().map(|(name, kernels)| (name, serial(kernels))).collect()
}

pub fn serial(kernels: &'static Kernels) -> Context<'static> {
    Context { kernels, team: &hbfp::parallel::Serial, threads: 1 }
}

/// Fails at the first element whose bits differ, naming it. `columns` are those of a row.
#[track_caller]
pub fn assert_same_bits(found: &[f32], expected: &[f32], columns: usize, what: &dyn Fn() -> String) {
    assert_eq!(found.len(), expected.len(), "{}", what());
    if let Some(i) = (0..found.len()).find(|&i| found[i].to_bits() != expected[i].to_bits()) {
        let differing = (0..found.len()).filter(|&i| found[i].to_bits() != expected[i].to_bits()).count();
        let (row, column) = (i / columns.max(1), i % columns.max(1));
        panic!(
            "{}: element [{row}, {column}] is {:e} ({:#010x}), by the definition {:e} ({:#010x}); {differing} of {} differ",
            what(),
            found[i],
            found[i].to_bits(),
            expected[i],
            expected[i].to_bits(),
            found.len()
        );
    }
}

/// One operand of a test product: matrices of [lines, k] if `by_line`, else of [k, lines], with any leading dimensions.
#[derive(Debug)]
pub struct TestOperand {
    pub tensor: Tensor,
    pub by_line: bool,
    pub format: BlockFormat,
    pub mode: RoundingMode,
}

impl TestOperand {
    /// One row-major matrix of a fill.
    pub fn new(
        (lines, k): (usize, usize),
        by_line: bool,
        format: BlockFormat,
        fill: Fill,
        mode: RoundingMode,
        seed: u64,
    ) -> Self {
        Self::of(&fill.values(lines * k, seed), &[], (lines, k), by_line, format, mode)
    }

    /// Row-major matrices with these row-major `values`.
    pub fn of(
        values: &[f32],
        batch: &[usize],
        (lines, k): (usize, usize),
        by_line: bool,
        format: BlockFormat,
        mode: RoundingMode,
    ) -> Self {
        let matrix = if by_line { [lines, k] } else { [k, lines] };
        let tensor = Tensor::new(values, &[batch, &matrix].concat(), Placement::DENSE, Storage::Poisoned);
        Self { tensor, by_line, format, mode }
    }

    /// One row-major matrix whose element `k` of `line` is `element(line, k)`.
    pub fn from_elements(
        (lines, k): (usize, usize),
        by_line: bool,
        format: BlockFormat,
        element: impl Fn(usize, usize) -> f32,
    ) -> Self {
        let values: Vec<f32> = (0..lines * k)
            .map(|i| if by_line { element(i / k, i % k) } else { element(i % lines, i / lines) })
            .collect();
        Self::of(&values, &[], (lines, k), by_line, format, RoundingMode::NEAREST_EVEN)
    }

    /// The same values elsewhere in memory.
    #[must_use]
    pub fn placed(mut self, placement: Placement, storage: Storage) -> Self {
        self.tensor = Tensor::new(&self.tensor.values(), self.tensor.shape(), placement, storage);
        self
    }

    pub fn matrices(&self) -> usize {
        let shape = self.tensor.shape();
        shape[..shape.len() - 2].iter().product()
    }
    pub fn lines(&self) -> usize {
        self.tensor.shape().iter().rev().nth(usize::from(self.by_line)).copied().unwrap()
    }
    pub fn k(&self) -> usize {
        self.tensor.shape().iter().rev().nth(usize::from(!self.by_line)).copied().unwrap()
    }
    pub fn axis(&self) -> usize {
        self.tensor.shape().len() - if self.by_line { 1 } else { 2 }
    }

    /// As an operand of a product.
    pub fn operand(&self) -> Operand<'_> {
        self.first_lines(self.lines())
    }

    /// The first lines of every matrix, as an operand.
    pub fn first_lines(&self, lines: usize) -> Operand<'_> {
        let dim = self.tensor.shape().len() - if self.by_line { 2 } else { 1 };
        Operand::Floats { x: self.tensor.cut(dim, lines), axis: self.axis(), format: self.format, mode: self.mode }
    }

    /// Encoded to planes by `ctx`.
    pub fn planes(&self, ctx: &Context<'_>) -> EncodedOperand {
        let layout = PlaneLayout::new(self.format, self.tensor.shape(), self.axis()).unwrap();
        let planes = encode(ctx, &self.tensor.view(), self.format, self.axis(), self.mode).unwrap();
        EncodedOperand { layout, planes, axis: self.axis() }
    }

    /// The lines of all matrices, one after the other, by the definition.
    pub fn encoded(&self) -> Encoded {
        let (matrices, lines, k) = (self.matrices(), self.lines(), self.k());
        let values = self.tensor.values();
        let columns = if self.by_line { k } else { lines };
        // Row (through all matrices) and column of an element.
        let place = |line: usize, j: usize| {
            if self.by_line { (line, j) } else { (line / lines * k + j, line % lines) }
        };
        let element = |line: usize, j: usize| {
            let (row, column) = place(line, j);
            values[row * columns + column]
        };
        let random = |line: usize, j: usize| {
            let (row, column) = place(line, j);
            self.mode.seed.bits(row as u32, column)
        };
        let block = self.format.block_along(k);
        let all = lines * matrices;
        if matches!(self.format.shape(), BlockShape::Line(_)) {
            return reference::encode(&self.format, (all, k, block), element, self.mode.rounding, random);
        }
        // Tiles and whole tensors: the exponent of a block of a line is that of the tile or the tensor around it.
        let mut out = Encoded { lines: all, k, block, codes: Vec::new(), exponents: Vec::new() };
        for line in 0..all {
            for from in (0..k).step_by(block) {
                let c = match self.format.shape() {
                    BlockShape::Tensor => reference::exponent(&self.format, &values),
                    BlockShape::Tile(t) if line % lines % t == 0 => {
                        let tile: Vec<f32> = (line..line + t.min(lines - line % lines))
                            .flat_map(|l| (from..(from + t).min(k)).map(move |j| (l, j)))
                            .map(|(l, j)| element(l, j))
                            .collect();
                        reference::exponent(&self.format, &tile)
                    }
                    // A later line of the tile above.
                    _ => out.exponents[out.exponents.len() - k.div_ceil(block)],
                };
                out.exponents.push(c);
                for j in from..(from + block).min(k) {
                    let r = random(line, j);
                    out.codes.push(reference::code(&self.format, c, element(line, j), self.mode.rounding, r));
                }
            }
        }
        out
    }
}

/// An operand in planes.
#[derive(Debug)]
pub struct EncodedOperand {
    pub layout: PlaneLayout,
    pub planes: Planes,
    axis: usize,
}

impl EncodedOperand {
    pub fn operand(&self) -> Operand<'_> {
        let Self { layout, planes, axis } = self;
        Operand::Planes { layout, exponents: &planes.exponents, mantissas: &planes.mantissas, axis: *axis }
    }
}

/// All elements of the products of `a` and `b`, [matrices, m, n], by the definition. One matrix `b` serves all of `a`.
pub fn products(a: &TestOperand, b: &TestOperand, start: Option<&[f32]>, bias: Option<&[f32]>) -> Vec<f32> {
    let (ea, eb) = (a.encoded(), b.encoded());
    let (m, n, shared) = (a.lines(), b.lines(), b.matrices() == 1);
    (0..ea.lines * n)
        .map(|i| {
            let (row, j) = (i / n, i % n);
            let column = if shared { j } else { row / m * n + j };
            reference::product(&ea, &eb, row, column, start.map_or(0.0, |start| start[i]), bias.map(|bias| bias[j]))
        })
        .collect()
}

/// Runs a product into an output between guard bands, `shift` elements behind the first one.
pub fn run(
    ctx: &Context<'_>,
    a: &Operand<'_>,
    b: &Right<'_>,
    start: &[f32],
    shift: usize,
    epilogue: Epilogue<'_>,
    workspace: &mut Workspace,
) -> Vec<f32> {
    let mut out = Guarded::new(shift + start.len(), 7.0);
    out.elements()[shift..].copy_from_slice(start);
    product(ctx, a, b, &mut out.elements()[shift..], epilogue, workspace).unwrap();
    let (before, found) = out.checked().split_at(shift);
    assert!(before.iter().all(|&x| x == 7.0), "a write before the output");
    found.to_vec()
}

/// Every level's product of two operands against the definition, the right one laid out in the call and before it.
#[track_caller]
pub fn check_product(levels: &[(&str, Context<'_>)], a: &TestOperand, b: &TestOperand, what: &dyn Fn() -> String) {
    let expected = products(a, b, None, None);
    // Whatever stood in C before must not matter.
    let start = vec![f32::NAN; expected.len()];
    for (name, ctx) in levels {
        let packed: Packed;
        let mut rights = vec![("unpacked", Right::Operand(b.operand()))];
        if b.matrices() == 1 {
            packed = prepack(ctx, &b.operand()).unwrap();
            rights.push(("packed", Right::Packed(&packed)));
        }
        for (how, right) in rights {
            let found = run(ctx, &a.operand(), &right, &start, 0, Epilogue::default(), &mut Workspace::default());
            let (columns, what) = (b.lines(), || format!("{name}, {how}: {}", what()));
            assert_same_bits(&found, &expected, columns, &what);
        }
    }
}

/// A value whose block, if it is the largest there, gets scale exponent `scale` and gives it a code of `code`.
pub fn at_scale(code: i32, scale: i32) -> f32 {
    // In f64, which holds subnormal f32 too. Out of f32's range the scale is clamped by the format, or infinite.
    (f64::from(code) * 2f64.powi(scale)) as f32
}

/// Whether an encoding holds a NaN block.
pub fn has_nan(encoded: &Encoded) -> bool {
    encoded.exponents.contains(&NAN_EXPONENT)
}
