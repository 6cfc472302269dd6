//! The three products of convolutions against their definition: sums over taps or pixels, written out, of codes that the
//! slow encoder makes of single lines. All levels, one to three threads, one workspace for calls of all sizes.

mod operands;

use hbfp::encode::encode as encode_planes;
use hbfp::gemm::convolution::{Convolution, Input, KeptKernel, Kernel, Place, keep_kernel, kept_kernel_bytes};
use hbfp::gemm::{Coding, Workspace};
use hbfp::parallel::Pool;
use hbfp::reference::{self, Encoded};
use hbfp::shape::{FloatTensor, PlaneLayout};
use hbfp::testing::{Fill, Guarded, TestRng};
use hbfp::{BlockFormat, BlockShape, Context, Error, Kernels, Level, Rounding};
use operands::memory::{Placement, Storage, Tensor};
use operands::{ROUNDINGS, assert_same_bits, at_scale, contexts, line, mode, pick, serial};

/// A convolution, its tensors and how each operand of each product is coded.
#[derive(Debug)]
struct Case {
    sizes: Convolution,
    x: Vec<f32>,
    w: Tensor,
    dy: Vec<f32>,
    /// Of X, of Y's shape.
    biases: [Option<Vec<f32>>; 2],
    flatten: bool,
    /// X and W; dY and W; dY and X.
    codings: [[Coding; 2]; 3],
}

fn count(sizes: [usize; 3]) -> usize {
    sizes.iter().product()
}

/// Row-major coordinates.
fn coordinates(index: usize, [_, n1, n2]: [usize; 3]) -> [usize; 3] {
    [index / (n1 * n2), index / n2 % n1, index % n2]
}

fn index(at: [usize; 3], [_, n1, n2]: [usize; 3]) -> usize {
    (at[0] * n1 + at[1]) * n2 + at[2]
}

/// An image [batch, pixels, channels]; its random bits are those of [batch, channels, pixels…].
struct Image<'a> {
    values: &'a [f32],
    pixels: [usize; 3],
    channels: usize,
    coding: Coding,
}

impl Image<'_> {
    fn at(&self, sample: usize, pixel: usize, channel: usize) -> f32 {
        self.values[(sample * count(self.pixels) + pixel) * self.channels + channel]
    }
    fn random(&self, sample: usize, pixel: usize, channel: usize) -> u16 {
        let [p0, p1, _] = self.pixels;
        let [i, j, column] = coordinates(pixel, self.pixels);
        self.coding.mode.seed.bits((((sample * self.channels + channel) * p0 + i) * p1 + j) as u32, column)
    }
}

/// Lines of `k` elements, each blocked by itself; `place` makes what an element and its random bits are found by.
fn encode<P>(
    coding: Coding,
    lines: usize,
    k: usize,
    place: impl Fn(usize, usize) -> P,
    element: impl Fn(P) -> f32,
    random: impl Fn(P) -> u16,
) -> Encoded {
    let Coding { format, mode } = coding;
    let sizes = (lines, k, format.block_along(k));
    reference::encode(&format, sizes, |l, j| element(place(l, j)), mode.rounding, |l, j| random(place(l, j)))
}

/// Σ over segments, in order, of the products of a line of `a` (None: zeros) and one of `b`, on from +0.0.
fn sum(a: &Encoded, b: &Encoded, segments: &[(Option<usize>, usize)], bias: Option<f32>) -> f32 {
    let zeros = Encoded { lines: 1, codes: vec![0; a.k], exponents: vec![0; a.k.div_ceil(a.block)], ..*a };
    let mut sum = 0.0;
    for &(left, right) in segments {
        let (a, left) = left.map_or((&zeros, 0), |left| (a, left));
        sum = reference::product(a, b, left, right, sum, None);
    }
    let sum = bias.map_or(sum, |bias| sum + bias);
    if sum.is_nan() { f32::from_bits(0x7FC0_0000) } else { sum }
}

impl Case {
    fn image(&self, input: bool, coding: Coding) -> Image<'_> {
        let Convolution { input: pixels, output, channels: [channels, out_channels], .. } = self.sizes;
        match input {
            true => Image { values: &self.x, pixels, channels, coding },
            false => Image { values: &self.dy, pixels: output, channels: out_channels, coding },
        }
    }

    /// Pixel of X under a tap of an output pixel.
    fn source(&self, output: usize, tap: usize) -> Option<usize> {
        let s = &self.sizes;
        let (o, k) = (coordinates(output, s.output), coordinates(tap, s.kernel));
        let mut at = [0; 3];
        for d in 0..3 {
            let p = (o[d] * s.stride[d] + k[d] * s.dilation[d]) as i64 - s.padding[d] as i64;
            if !(0..s.input[d] as i64).contains(&p) {
                return None;
            }
            at[d] = p as usize;
        }
        Some(index(at, s.input))
    }

    fn group_channels(&self) -> [usize; 2] {
        self.sizes.channels.map(|channels| channels / self.sizes.groups)
    }

    /// Element and random bits of the kernel at output channel, input channel of the group, tap.
    fn kernel(&self, coding: Coding) -> [Box<dyn Fn([usize; 3]) -> f32 + '_>; 2] {
        let [k0, k1, k2] = self.sizes.kernel;
        let [channels, _] = self.group_channels();
        let values = self.w.values();
        let taps = k0 * k1 * k2;
        let element = move |[o, c, tap]: [usize; 3]| values[(o * channels + c) * taps + tap];
        let random = move |[o, c, tap]: [usize; 3]| {
            f32::from(coding.mode.seed.bits(((o * channels + c) * k0 * k1 + tap / k2) as u32, tap % k2))
        };
        [Box::new(element), Box::new(random)]
    }

    fn forward(&self) -> Vec<f32> {
        let Convolution { batch, channels: [all, outs], groups, input, output, kernel, .. } = self.sizes;
        let [channels, columns] = self.group_channels();
        let (pixels, taps) = (count(output), count(kernel));
        let [xc, wc] = self.codings[0];
        let (image, [w, r]) = (self.image(true, xc), self.kernel(wc));
        let bias = |o: usize| self.biases[1].as_ref().map(|bias| bias[o]);
        let mut out = Vec::new();
        if self.flatten {
            // Patches [batch, groups, output pixels, taps · channels] with random bits of their own.
            let patch = |line: usize, j: usize| (line, j);
            let element = |(line, j): (usize, usize)| {
                let (sample, g, o) = (line / pixels / groups, line / pixels % groups, line % pixels);
                self.source(o, j / channels).map_or(0.0, |p| image.at(sample, p, g * channels + j % channels))
            };
            let random = |(line, j): (usize, usize)| xc.mode.seed.bits(line as u32, j);
            let x = encode(xc, batch * groups * pixels, taps * channels, patch, element, random);
            let place = |o: usize, j: usize| [o, j % channels, j / channels];
            let w = encode(wc, outs, taps * channels, place, w, |at| r(at) as u16);
            for i in 0..batch * pixels * outs {
                let (sample, pixel, o) = (i / outs / pixels, i / outs % pixels, i % outs);
                let line = (sample * groups + o / columns) * pixels + pixel;
                out.push(sum(&x, &w, &[(Some(line), o)], bias(o)));
            }
            return out;
        }
        let place = |line: usize, j: usize| (line / groups, line % groups * channels + j);
        let (inputs, lines) = (count(input), batch * count(input) * groups);
        let x = encode(
            xc,
            lines,
            channels,
            place,
            |(at, c)| image.at(at / inputs, at % inputs, c),
            |(at, c)| image.random(at / inputs, at % inputs, c),
        );
        assert_eq!(all, image.channels);
        let w = encode(wc, outs * taps, channels, |l, c| [l / taps, c, l % taps], w, |at| r(at) as u16);
        for i in 0..batch * pixels * outs {
            let (sample, pixel, o) = (i / outs / pixels, i / outs % pixels, i % outs);
            let line = |p: usize| (sample * inputs + p) * groups + o / columns;
            let segments: Vec<_> = (0..taps).map(|tap| (self.source(pixel, tap).map(line), o * taps + tap)).collect();
            out.push(sum(&x, &w, &segments, bias(o)));
        }
        out
    }

    fn input_gradient(&self) -> Vec<f32> {
        let Convolution { batch, channels: [all, outs], groups, input, output, kernel, .. } = self.sizes;
        let [channels, columns] = self.group_channels();
        let (pixels, inputs, taps) = (count(output), count(input), count(kernel));
        let [yc, wc] = self.codings[1];
        let (image, [w, r]) = (self.image(false, yc), self.kernel(wc));
        let place = |line: usize, j: usize| (line / groups, line % groups * columns + j);
        let dy = encode(
            yc,
            batch * pixels * groups,
            columns,
            place,
            |(at, o)| image.at(at / pixels, at % pixels, o),
            |(at, o)| image.random(at / pixels, at % pixels, o),
        );
        let place = |line: usize, j: usize| {
            let (c, tap) = (line / taps, line % taps);
            [c / channels * columns + j, c % channels, tap]
        };
        let w = encode(wc, all * taps, columns, place, w, |at| r(at) as u16);
        assert_eq!(outs, image.channels);
        // The output pixel that reads an input pixel through a tap: by search.
        let reader = |p: usize, tap: usize| (0..pixels).find(|&o| self.source(o, tap) == Some(p));
        let readers: Vec<Vec<_>> = (0..inputs).map(|p| (0..taps).map(|tap| reader(p, tap)).collect()).collect();
        (0..batch * inputs * all)
            .map(|i| {
                let (sample, p, c) = (i / all / inputs, i / all % inputs, i % all);
                let line = |o: usize| (sample * pixels + o) * groups + c / channels;
                let segments: Vec<_> = (0..taps).map(|tap| (readers[p][tap].map(line), c * taps + tap)).collect();
                sum(&dy, &w, &segments, self.biases[0].as_ref().map(|bias| bias[c]))
            })
            .collect()
    }

    fn weight_gradient(&self) -> Vec<f32> {
        let Convolution { batch, channels: [all, outs], groups, input, output, kernel, .. } = self.sizes;
        let [channels, columns] = self.group_channels();
        let (pixels, taps) = (count(output), count(kernel));
        let [yc, xc] = self.codings[2];
        let along_batch = |image: &Image<'_>, lines: usize| {
            let channels = image.channels;
            encode(
                image.coding,
                lines,
                batch,
                |line, sample| (sample, line / channels, line % channels),
                |(sample, pixel, c)| image.at(sample, pixel, c),
                |(sample, pixel, c)| image.random(sample, pixel, c),
            )
        };
        let dy = along_batch(&self.image(false, yc), pixels * outs);
        let x = along_batch(&self.image(true, xc), count(input) * all);
        (0..groups * taps * channels * columns)
            .map(|i| {
                let (g, tap) = (i / columns / channels / taps, i / columns / channels % taps);
                let (c, o) = (g * channels + i / columns % channels, g * columns + i % columns);
                let line = |p: usize| p * all + c;
                let segments: Vec<_> =
                    (0..pixels).map(|pixel| (self.source(pixel, tap).map(line), pixel * outs + o)).collect();
                sum(&x, &dy, &segments, None)
            })
            .collect()
    }

    /// All products, those from what was kept of X, of dY and of both, and the first two by a kept kernel, in this order.
    /// Outputs stand between guard bands, and hold NaN before.
    fn run(&self, ctx: &Context<'_>, workspace: &mut Workspace) -> [Vec<f32>; 8] {
        let Convolution { batch, channels: [all, outs], input, output, kernel, .. } = self.sizes;
        let (sizes, w) = (self.sizes, self.w.view());
        let out = |len: usize| Guarded::new(len, f32::NAN);
        let bias = |i: usize| self.biases[i].as_deref();
        let weights = count(kernel) * all / sizes.groups * outs;
        let mut y = out(batch * count(output) * outs);
        let (codings, flatten) = (self.codings, self.flatten);
        let floats = Kernel::Floats(&w);
        sizes.forward(ctx, &self.x, floats, codings[0], flatten, bias(1), y.elements(), workspace).unwrap();
        let mut dx = out(batch * count(input) * all);
        sizes.input_gradient(ctx, &self.dy, floats, codings[1], bias(0), dx.elements(), workspace).unwrap();
        let [mut kept_y, mut kept_dx] = [y.checked(), dx.checked()].map(|floats| floats.to_vec());
        if let Some((layout, bytes)) = self.keep_kernel(ctx, 1).filter(|_| !flatten || count(kernel) == 1) {
            let kept = Kernel::Kept(KeptKernel { layout: &layout, groups: sizes.groups, bytes: &bytes[65..] });
            kept_y.fill(f32::NAN);
            sizes.forward(ctx, &self.x, kept, codings[0], flatten, bias(1), &mut kept_y, workspace).unwrap();
        }
        if let Some((layout, bytes)) = self.keep_kernel(ctx, 0) {
            let kept = Kernel::Kept(KeptKernel { layout: &layout, groups: sizes.groups, bytes: &bytes[65..] });
            kept_dx.fill(f32::NAN);
            sizes.input_gradient(ctx, &self.dy, kept, codings[1], bias(0), &mut kept_dx, workspace).unwrap();
        }
        let kept = [Place::Input, Place::Output].map(|place| self.keep(ctx, place, workspace));
        let mut gradient = |keeps: [bool; 2]| {
            let mut dw = out(weights);
            let [x, dy] = [(0, &self.x), (1, &self.dy)].map(|(i, floats)| match &kept[i] {
                Some(bytes) if keeps[i] => Input::Kept(bytes),
                _ => Input::Floats(floats),
            });
            sizes.weight_gradient(ctx, dy, x, codings[2], dw.elements(), workspace).unwrap();
            dw.checked().to_vec()
        };
        let [a, b, c, d] = [[false, false], [true, false], [false, true], [true, true]].map(&mut gradient);
        [y.checked().to_vec(), dx.checked().to_vec(), a, b, c, d, kept_y, kept_dx]
    }

    /// The kernel's codes along an axis, laid out from its 65th byte on. None: it can't be kept. What was kept gives the
    /// planes back.
    fn keep_kernel(&self, ctx: &Context<'_>, axis: usize) -> Option<(PlaneLayout, Vec<u8>)> {
        let Convolution { channels: [all, outs], groups, kernel, .. } = self.sizes;
        let Coding { format, mode } = self.codings[1 - axis][1];
        let layout = PlaneLayout::new(format, &[outs, all / groups, count(kernel)], axis).unwrap();
        let len = kept_kernel_bytes(ctx, &layout, groups)?;
        let planes = encode_planes(ctx, &self.w.view(), format, axis, mode).unwrap();
        let mut bytes = vec![0xA5; 65 + len];
        let halves = [&planes.exponents[..], &planes.mantissas[..]];
        keep_kernel(ctx, &layout, groups, halves, &mut bytes[65..]).unwrap();
        assert!(bytes[..65].iter().all(|&b| b == 0xA5), "a write outside the kept bytes");
        let kept = KeptKernel { layout: &layout, groups, bytes: &bytes[65..] };
        let (exponents, mantissas) = kept.planes(ctx).unwrap();
        // The codes are zeros where a block has none, whatever its exponent was.
        assert_eq!(mantissas, planes.mantissas, "{format} of {:?}", self.sizes);
        assert!(exponents.iter().zip(&planes.exponents).all(|(&found, &c)| found == c || found == 0));
        Some((layout, bytes))
    }

    /// What is kept of an image: between bands that must stay, at any alignment.
    fn keep(&self, ctx: &Context<'_>, place: Place, workspace: &mut Workspace) -> Option<Vec<u8>> {
        let (image, coding) = match place {
            Place::Input => (&self.x, self.codings[2][1]),
            Place::Output => (&self.dy, self.codings[2][0]),
        };
        let len = self.sizes.kept_bytes(ctx, place, coding.format)?;
        let mut bytes = vec![0xA5; len + 130];
        self.sizes.keep(ctx, place, image, coding, &mut bytes[65..65 + len], workspace).unwrap();
        assert!(bytes[..65].iter().chain(&bytes[65 + len..]).all(|&b| b == 0xA5), "a write outside the kept bytes");
        Some(bytes[65..65 + len].to_vec())
    }

    fn expected(&self) -> [Vec<f32>; 8] {
        let (y, dx, dw) = (self.forward(), self.input_gradient(), self.weight_gradient());
        [y.clone(), dx.clone(), dw.clone(), dw.clone(), dw.clone(), dw, y, dx]
    }

    #[track_caller]
    fn check(&self, found: &[Vec<f32>; 8], expected: &[Vec<f32>; 8], what: &dyn Fn() -> String) {
        let [channels, columns] = [self.sizes.channels, self.group_channels()].map(|channels| channels[1]);
        let names = [
            ("forward", channels),
            ("input gradient", self.sizes.channels[0]),
            ("weight gradient", columns),
            ("weight gradient, X kept", columns),
            ("weight gradient, dY kept", columns),
            ("weight gradient, both kept", columns),
            ("forward by a kept kernel", channels),
            ("input gradient by a kept kernel", self.sizes.channels[0]),
        ];
        for (i, (name, columns)) in names.into_iter().enumerate() {
            assert_same_bits(&found[i], &expected[i], columns, &|| {
                let formats =
                    self.codings.map(|pair| pair.map(|Coding { format, mode }| (format.to_string(), mode.rounding)));
                format!("{}: {name} of {:?}, flatten {}, {formats:?}", what(), self.sizes, self.flatten)
            });
        }
    }
}

/// Fills whose blocks have scales around the ends of the fast range of two formats.
fn border_values(rng: &mut TestRng, n: usize, bits: u8) -> Vec<f32> {
    let scales: [i32; 3] = if rng.below(2) == 0 { [-64, -63, -62] } else { [51, 52, 53] };
    let code = |rng: &mut TestRng| rng.below(1 << bits) as i32 - (1 << (bits - 1)) + 1;
    // Few changes of scale: tiles of both kinds side by side.
    let runs: Vec<i32> = (0..n.div_ceil(24)).map(|_| pick(rng, &scales)).collect();
    (0..n).map(|i| at_scale(code(rng), runs[i / 24])).collect()
}

fn values(rng: &mut TestRng, n: usize, bits: u8) -> Vec<f32> {
    let fill = match rng.below(10) {
        0 => return border_values(rng, n, bits.min(8)),
        1 => Fill::NonFinite,
        2 => Fill::Extreme,
        3 => Fill::Ties,
        4 | 5 => Fill::Wide,
        _ => Fill::Plain,
    };
    let mut values = fill.values(n, rng.next_u64());
    if n > 0 && rng.below(6) == 0 {
        values[rng.below(n)] = f32::NAN;
    }
    values
}

/// Everything drawn at random. `widths` are those of the operands.
fn draw(rng: &mut TestRng, widths: &[u8], most: usize) -> Case {
    draw_of(rng, widths, most, false)
}

/// The same; `narrow`: of many groups of few channels, equally many on either side.
fn draw_of(rng: &mut TestRng, widths: &[u8], most: usize, narrow: bool) -> Case {
    let rank = 1 + rng.below(3);
    let mut sizes = Convolution {
        batch: 1 + rng.below(4),
        channels: [1, 1],
        groups: pick(rng, &[1, 1, 1, 2, 3, 5]),
        input: [1; 3],
        output: [1; 3],
        kernel: [1; 3],
        stride: [1; 3],
        padding: [0; 3],
        dilation: [1; 3],
    };
    let group = [pick(rng, &[1, 1, 2, 3, 4, 5, 8, 12, 16, 19, 20]), pick(rng, &[1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 33])];
    // Many groups of many channels would take long.
    let most_channels = if sizes.groups > 1 { 9 } else { 64 };
    sizes.channels = group.map(|n| n.min(most_channels) * sizes.groups);
    if narrow {
        let channels = pick(rng, &[1, 2, 4, 8]);
        sizes.groups = 2 + rng.below(40 / channels);
        sizes.channels = [channels * sizes.groups; 2];
    }
    for d in 3 - rank..3 {
        sizes.kernel[d] = 1 + rng.below([5, 3, 2][rank - 1]);
        sizes.stride[d] = 1 + rng.below(3);
        sizes.dilation[d] = 1 + rng.below(2);
        sizes.padding[d] = rng.below(4);
        sizes.input[d] = 1 + rng.below([most, most / 2, most / 3][rank - 1].max(2));
        let reach = (sizes.kernel[d] - 1) * sizes.dilation[d] + 1;
        // Padding behind is whatever it is: pixels of Y may see nothing of X, and the last ones of X be seen by none.
        let padded = sizes.input[d] + sizes.padding[d] + rng.below(3);
        sizes.output[d] = (padded.max(reach) - reach) / sizes.stride[d] + 1;
    }
    let block = pick(rng, &[2, 3, 4, 7, 8, 16, 20, 32, 64]);
    if rng.below(4) == 0 {
        sizes.batch = pick(rng, &[block - 1, block, block + 1, 2 * block + 1]).min(20);
    }
    let mut coding = |stream| {
        let format = line(pick(rng, widths), block);
        Coding { format, mode: mode(pick(rng, &ROUNDINGS), stream) }
    };
    let codings = [[coding(1), coding(2)], [coding(3), coding(4)], [coding(5), coding(6)]];
    let bits = |i: usize| codings[i][0].format.bits();
    let [channels, outs] = sizes.channels;
    let x = values(rng, sizes.batch * count(sizes.input) * channels, bits(0));
    let dy = values(rng, sizes.batch * count(sizes.output) * outs, bits(1));
    let [k0, k1, k2] = sizes.kernel;
    let shape = [outs, channels / sizes.groups, k0, k1, k2];
    let w = values(rng, shape.iter().product(), codings[0][1].format.bits());
    let placements: Vec<_> = Placement::ALL.into_iter().filter(|placement| !placement.repeated).collect();
    let w = Tensor::new(&w, &shape, pick(rng, &placements), Storage::Poisoned);
    let mut bias = |n: usize| (rng.below(2) == 0).then(|| Fill::Wide.values(n, rng.next_u64()));
    Case { sizes, x, w, dy, biases: [bias(channels), bias(outs)], flatten: rng.below(3) == 0, codings }
}

/// A case of plain values, nearest-even where not stochastic.
fn plain(sizes: Convolution, flatten: bool, formats: [BlockFormat; 2], rounding: Rounding) -> Case {
    let Convolution { batch, channels: [channels, outs], groups, input, output, kernel: [k0, k1, k2], .. } = sizes;
    let coding = |i: usize, stream| Coding { format: formats[i], mode: mode(rounding, stream) };
    let shape = [outs, channels / groups, k0, k1, k2];
    let w = Fill::Plain.values(shape.iter().product(), 1);
    Case {
        sizes,
        x: Fill::Plain.values(batch * count(input) * channels, 2),
        w: Tensor::new(&w, &shape, Placement::DENSE, Storage::Poisoned),
        dy: Fill::Plain.values(batch * count(output) * outs, 3),
        biases: [None, Some(Fill::Plain.values(outs, 4))],
        flatten,
        codings: [[coding(0, 1), coding(1, 2)], [coding(0, 3), coding(1, 4)], [coding(1, 5), coding(0, 6)]],
    }
}

const SQUARE: Convolution = Convolution {
    batch: 2,
    channels: [16, 32],
    groups: 1,
    input: [1, 6, 6],
    output: [1, 6, 6],
    kernel: [1, 3, 3],
    stride: [1; 3],
    padding: [0, 1, 1],
    dilation: [1; 3],
};

/// Every level's results against the definition's, in one workspace a level.
fn check_cases(levels: &[(&str, Context<'_>)], cases: impl Iterator<Item = Case>) {
    let mut workspaces: Vec<_> = levels.iter().map(|_| Workspace::default()).collect();
    for (number, case) in cases.enumerate() {
        let expected = case.expected();
        for ((name, ctx), workspace) in levels.iter().zip(&mut workspaces) {
            case.check(&case.run(ctx, workspace), &expected, &|| format!("{name}: case {number}"));
        }
    }
}

#[test]
fn equals_the_definition_with_everything_drawn_at_random() {
    // Hunted: any index that is off, and whatever an earlier, larger call left in the workspace.
    let mut rng = TestRng(51);
    check_cases(&contexts(), (0..150).map(|_| draw(&mut rng, &[2, 3, 4, 4, 5, 6, 7, 8], 9)));
}

#[test]
fn narrow_groups_equal_the_definition() {
    let mut rng = TestRng(57);
    let drawn = (0..160).map(|_| draw_of(&mut rng, &[2, 3, 4, 4, 5, 6, 7, 8], 9, true));
    check_cases(&contexts(), drawn);
}

#[test]
fn largest_codes_of_narrow_groups() {
    // Hunted: sums of two products that leave 16 bits.
    let mut cases = Vec::new();
    for (group, sign) in [(1, 1.0), (2, -1.0), (4, 1.0), (8, -1.0)] {
        for bits in [[8, 8], [7, 8], [8, 7], [6, 8], [8, 4]] {
            let sizes = Convolution { batch: 8, channels: [16, 16], groups: 16 / group, ..SQUARE };
            for flatten in [false, true] {
                let mut case = plain(sizes, flatten, bits.map(|bits| line(bits, 64)), Rounding::TowardZero);
                case.x.fill(1.99999);
                case.dy.fill(1.99999 * sign);
                let w = vec![1.99999 * sign; case.w.values().len()];
                case.w = Tensor::new(&w, case.w.shape(), Placement::DENSE, Storage::Poisoned);
                cases.push(case);
            }
        }
    }
    check_cases(&contexts(), cases.into_iter());
}

#[test]
fn formats_without_panels_equal_the_definition() {
    let mut rng = TestRng(52);
    check_cases(&contexts(), (0..40).map(|_| draw(&mut rng, &[4, 8, 9, 12, 16], 5)));
    // Narrow exponents clamp from above, which panels cannot.
    let narrow = line(4, 8).with_exponent(5, None).unwrap();
    let sizes = Convolution { channels: [6, 4], groups: 2, ..SQUARE };
    check_cases(
        &contexts(),
        [false, true].map(|flatten| plain(sizes, flatten, [narrow; 2], Rounding::Stochastic)).into_iter(),
    );
}

#[test]
fn all_pairs_of_widths_along_every_reduction() {
    // Hunted: what is kept of 8-bit X for the AVX2 level's 16-bit codes, and corrections of every kind.
    let levels = contexts();
    let sizes = Convolution { batch: 9, channels: [20, 19], input: [1, 3, 3], output: [1, 3, 3], ..SQUARE };
    let pairs = (2..=8).flat_map(|a| (2..=8).map(move |b| [line(a, 8), line(b, 8)]));
    check_cases(&levels, pairs.map(|pair| plain(sizes, false, pair, Rounding::NearestEven)));
    // Blocks whose sums fit no accumulator with an exponent: the general product of panels.
    let sizes = Convolution { batch: 2, channels: [300, 5], input: [1, 2, 2], output: [1, 2, 2], ..SQUARE };
    check_cases(
        &levels,
        [[8, 8], [7, 8]].map(|pair| plain(sizes, false, pair.map(|b| line(b, 300)), Rounding::NearestEven)).into_iter(),
    );
}

#[test]
fn passes_over_more_taps_and_pixels_than_a_cache_holds() {
    // Hunted: a pass that begins at the wrong piece, and NaN and exponents of one pass that are lost in the next.
    let levels = contexts();
    let sizes = Convolution { batch: 1, channels: [64, 17], kernel: [1, 7, 7], padding: [0, 3, 3], ..SQUARE };
    let sizes = Convolution { input: [1, 4, 3], output: [1, 4, 3], ..sizes };
    let along_batch = Convolution {
        batch: 70,
        channels: [5, 17],
        input: [1, 8, 9],
        output: [1, 8, 9],
        kernel: [1, 2, 1],
        padding: [0; 3],
        ..SQUARE
    };
    let along_batch = Convolution { output: [1, 7, 9], ..along_batch };
    let deep = line(4, 64);
    let mut cases = Vec::new();
    for sizes in [sizes, along_batch] {
        for at in [None, Some(0), Some(1), Some(2)] {
            let mut case = plain(sizes, false, [deep; 2], Rounding::NearestEven);
            if let Some(third) = at {
                let at = |n: usize| (n - 1) * third / 2;
                let ([x, y], value) = ([at(case.x.len()), at(case.dy.len())], [f32::NAN, 3e38, 1e-36][third]);
                (case.x[x], case.dy[y]) = (value, value);
            }
            cases.push(case);
        }
    }
    // ∞ − ∞ in the first pass is a NaN of the CPU's making. Later passes are fast and there is no bias, yet it must become
    // the one NaN.
    for (sizes, product) in [(sizes, 0), (along_batch, 2)] {
        let mut case = plain(sizes, false, [deep; 2], Rounding::NearestEven);
        case.biases = [None, None];
        case.x.fill(1.0);
        case.dy.fill(1.0);
        case.w = Tensor::new(&vec![1.0; case.w.values().len()], case.w.shape(), Placement::DENSE, Storage::Poisoned);
        let channels = sizes.channels[0];
        for sample in case.x.chunks_exact_mut(count(sizes.input) * channels) {
            sample[..channels].fill(3e38);
            sample[channels..2 * channels].fill(-3e38);
        }
        assert!(case.expected()[product].iter().any(|x| x.is_nan()), "the case hunts nothing");
        cases.push(case);
    }
    check_cases(&levels, cases.into_iter());
}

#[test]
fn results_larger_than_the_caches() {
    // Hunted: rows that go around the caches and are not there, or not where they belong. Samples are all the same, and one
    // of them alone is small.
    const BATCH: usize = 100;
    let pixels = [1, 40, 40];
    let plane = Convolution { batch: BATCH, channels: [32, 32], input: pixels, output: pixels, ..SQUARE };
    let sixteens = Convolution { channels: [16, 16], ..plane };
    for (sizes, flatten) in
        [(sixteens, false), (Convolution { groups: 32, ..plane }, true), (Convolution { groups: 8, ..plane }, true)]
    {
        let mut case = plain(Convolution { batch: 1, ..sizes }, flatten, [line(4, 16); 2], Rounding::NearestEven);
        case.biases = [None, None];
        for (name, ctx) in contexts() {
            let mut workspace = Workspace::default();
            let [[x, w], [dy, dw], _] = case.codings;
            let single = &mut [vec![0.0; case.dy.len()], vec![0.0; case.x.len()]];
            let view = case.w.view();
            let tensor = Kernel::Floats(&view);
            case.sizes.forward(&ctx, &case.x, tensor, [x, w], flatten, None, &mut single[0], &mut workspace).unwrap();
            case.sizes.input_gradient(&ctx, &case.dy, tensor, [dy, dw], None, &mut single[1], &mut workspace).unwrap();
            let images = [&case.x, &case.dy].map(|image| image.repeat(BATCH));
            for (product, single) in single.iter().enumerate() {
                // On a cache line, as a tensor's memory is.
                let mut memory = vec![f32::NAN; BATCH * single.len() + 16];
                let first = memory.as_ptr().align_offset(64);
                let out = &mut memory[first..][..BATCH * single.len()];
                match product {
                    0 => sizes.forward(&ctx, &images[0], tensor, [x, w], flatten, None, out, &mut workspace),
                    _ => sizes.input_gradient(&ctx, &images[1], tensor, [dy, dw], None, out, &mut workspace),
                }
                .unwrap();
                for (sample, found) in out.chunks_exact(single.len()).enumerate() {
                    assert_same_bits(found, single, sizes.channels[0], &|| {
                        format!("{name}: product {product}, sample {sample}, {sizes:?}")
                    });
                }
            }
        }
    }
}

#[test]
fn random_bits_that_come_with_the_strips() {
    // Hunted: of dY, bits of another pixel, sample, row of pixels, channel or block; those of the pixels before; tasks that
    // begin within the pixels whose bits come together.
    let levels = contexts();
    let pool = Pool::new();
    let mut cases = Vec::new();
    for (batch, outs, output, block) in [
        (70, 16, [1, 2, 16], 64),
        (9, 16, [2, 2, 8], 4),
        (33, 8, [1, 3, 8], 16),
        (5, 32, [1, 3, 24], 64),
        (67, 64, [1, 2, 8], 32),
        (3, 128, [1, 1, 16], 64),
    ] {
        let (kernel, padding) = ([1, 1, 2], [0; 3]);
        let input = [output[0], output[1], output[2] + 1];
        let sizes = Convolution { batch, channels: [3, outs], input, output, kernel, padding, ..SQUARE };
        cases.push(plain(sizes, false, [line(4, block); 2], Rounding::Stochastic));
    }
    let mut workspaces: Vec<_> = levels.iter().map(|_| Workspace::default()).collect();
    for case in &cases {
        let expected = case.expected();
        for ((name, ctx), workspace) in levels.iter().zip(&mut workspaces) {
            for threads in [1, 3] {
                let ctx = Context { team: &pool, threads, ..*ctx };
                let what = || format!("{name}, {threads} threads: {:?}", case.sizes);
                case.check(&case.run(&ctx, workspace), &expected, &what);
            }
        }
    }
}

#[test]
fn rows_of_sixteen_pixels_and_more() {
    // Hunted: a row that begins at the wrong line, the last sixteen of a row of pixels, which overlap those before, pixels
    // between the steps of a stride, margins before and behind in each dimension, blocks of all lengths that a matrix unit
    // takes and what longer ones left behind them, products more than are under way at once, and blocks among them that
    // need the general product.
    let levels = contexts();
    let mut rng = TestRng(53);
    let mut cases = Vec::new();
    for (number, (width, stride)) in [16, 20, 32, 36].into_iter().flat_map(|w| [1, 2, 3].map(|s| (w, s))).enumerate() {
        for (channels, groups) in
            [([16, 16], 1), ([32, 16], 1), ([24, 32], 1), ([64, 16], 1), ([72, 32], 1), ([32, 64], 2)]
        {
            let kernel = pick(&mut rng, &[[1, 3, 3], [1, 3, 3], [1, 2, 3], [1, 1, 5], [2, 1, 2], [1, 1, 1]]);
            let mut sizes = Convolution { batch: pick(&mut rng, &[1, 2, 5]), channels, groups, kernel, ..SQUARE };
            sizes.input = [2, 2 + rng.below(3), width];
            for (d, taps) in kernel.into_iter().enumerate() {
                sizes.stride[d] = if d == 2 { stride } else { 1 + rng.below(2) };
                sizes.dilation[d] = 1 + rng.below(2);
                sizes.padding[d] = rng.below(3);
                let reach = (taps - 1) * sizes.dilation[d] + 1;
                // As often as not padding behind, so that Y has whole rows of sixteen, too.
                let padded = sizes.input[d] + 2 * sizes.padding[d] + [0, stride][rng.below(2)];
                sizes.output[d] = (padded.max(reach) - reach) / sizes.stride[d] + 1;
            }
            if stride == 1 {
                (sizes.output[2], sizes.padding[2]) = (width, (kernel[2] - 1) * sizes.dilation[2] / 2);
            }
            let formats = [line(pick(&mut rng, &[2, 4, 8]), 64), line(pick(&mut rng, &[3, 4, 8]), 64)];
            let mut case = plain(sizes, false, formats, pick(&mut rng, &ROUNDINGS));
            if number % 3 > 0 {
                let len = case.w.values().len();
                case.x = values(&mut rng, case.x.len(), 4);
                case.dy = values(&mut rng, case.dy.len(), 4);
                case.w = Tensor::new(&values(&mut rng, len, 4), case.w.shape(), Placement::DENSE, Storage::Poisoned);
            }
            cases.push(case);
        }
    }
    check_cases(&levels, cases.into_iter());
}

#[test]
fn kept_kernels_of_groups_and_of_taps_that_meet_nothing() {
    // Hunted: groups, panels, taps and blocks that change places, and taps left out for zeros that would have met a NaN.
    let levels = contexts();
    let sizes = [
        Convolution { channels: [48, 96], groups: 3, ..SQUARE },
        Convolution { channels: [64, 64], groups: 2, stride: [1, 2, 1], ..SQUARE },
        Convolution { channels: [40, 72], stride: [1, 2, 3], output: [1, 3, 2], kernel: [1, 2, 3], ..SQUARE },
        Convolution { channels: [16, 100], input: [1, 1, 2], output: [1, 1, 2], ..SQUARE },
        Convolution { channels: [32, 32], input: [1, 1, 1], output: [1, 1, 1], batch: 5, ..SQUARE },
        Convolution { channels: [80, 48], groups: 2, kernel: [1; 3], padding: [0; 3], ..SQUARE },
    ];
    for (number, sizes) in sizes.into_iter().enumerate() {
        for (bits, block) in [(4, 64), (4, 16), (3, 7), (6, 32), (8, 16)] {
            for (flatten, nan) in [(false, false), (false, true), (number == 5, false)] {
                let mut case = plain(sizes, flatten, [line(bits, block); 2], Rounding::NearestEven);
                if nan {
                    let mut w = Fill::Plain.values(case.w.values().len(), 1);
                    let taps = count(sizes.kernel);
                    w[taps * 17] = f32::NAN;
                    w[taps * 5..taps * 6].fill(1e-30);
                    let [outs, channels] = [sizes.channels[1], sizes.channels[0] / sizes.groups];
                    let [k0, k1, k2] = sizes.kernel;
                    case.w = Tensor::new(&w, &[outs, channels, k0, k1, k2], Placement::DENSE, Storage::Poisoned);
                }
                let ctx = &levels[0].1;
                let kept = [0, 1].map(|axis| case.keep_kernel(ctx, axis).is_some());
                let whole = sizes.groups == 1 || (sizes.channels[1] / sizes.groups).is_multiple_of(block);
                assert_eq!(kept, [whole, true], "{sizes:?} in blocks of {block}");
                check_cases(&levels, [case].into_iter());
            }
        }
    }
}

#[test]
fn kernels_that_can_not_be_kept_are_errors() {
    let ctx = Context::serial();
    let layout = |format, shape: [usize; 3], axis| PlaneLayout::new(format, &shape, axis).unwrap();
    let nibbles = line(4, 16);
    let tile = BlockFormat::new(4, BlockShape::Tile(16)).unwrap();
    for (format, shape, axis, groups) in [
        (nibbles, [32, 15, 9], 1, 1), // few channels
        (nibbles, [15, 32, 9], 0, 1),
        (nibbles, [32, 32, 9], 1, 3), // groups that do not divide
        (nibbles, [32, 32, 9], 1, 0),
        (nibbles, [48, 32, 9], 0, 2), // groups that end inside a block
        (nibbles, [32, 32, 9], 2, 1), // along the taps
        (nibbles, [32, 32, 0], 1, 1), // nothing
        (line(9, 16), [32, 32, 9], 1, 1),
        (tile, [32, 32, 9], 1, 1),
    ] {
        let layout = layout(format, shape, axis);
        assert_eq!(kept_kernel_bytes(&ctx, &layout, groups), None, "{format} of {shape:?} along {axis}");
        let result = keep_kernel(&ctx, &layout, groups, [&[], &[]], &mut []);
        assert!(matches!(result, Err(Error::Shape { .. })), "{result:?}");
    }
    let (sizes, layout) = (Convolution { channels: [32, 64], ..SQUARE }, layout(nibbles, [64, 32, 9], 1));
    let len = kept_kernel_bytes(&ctx, &layout, 1).unwrap();
    let [exponents, mantissas] = [layout.exponents(), layout.mantissas()].map(|size| vec![0; size[0] * size[1]]);
    let mut bytes = vec![0; len];
    for (planes, len) in [([&exponents[1..], &mantissas], len), ([&exponents, &mantissas[1..]], len)] {
        let result = keep_kernel(&ctx, &layout, 1, planes, &mut bytes[..len]);
        assert!(matches!(result, Err(Error::Shape { .. })), "{result:?}");
    }
    let result = keep_kernel(&ctx, &layout, 1, [&exponents, &mantissas], &mut bytes[1..]);
    assert!(matches!(result, Err(Error::Shape { .. })), "{result:?}");
    keep_kernel(&ctx, &layout, 1, [&exponents, &mantissas], &mut bytes).unwrap();
    let mut bad = mantissas.clone();
    bad[0] = 0x88;
    let result = keep_kernel(&ctx, &layout, 1, [&exponents, &bad], &mut bytes.clone());
    assert!(matches!(result, Err(Error::Code { .. })), "{result:?}");

    // And those that were kept for something else.
    let coding = |format| Coding { format, mode: mode(Rounding::NearestEven, 1) };
    let (mut workspace, image) = (Workspace::default(), vec![0.0; 2 * 36 * 64]);
    let mut out = vec![7.0; 2 * 36 * 64];
    let mut run = |sizes: Convolution, kept: KeptKernel<'_>, format, forward: bool| {
        let (codings, w) = ([coding(line(4, 16)), coding(format)], Kernel::Kept(kept));
        let [x, y] = sizes.channels.map(|channels| 2 * 36 * channels);
        let result = if forward {
            sizes.forward(&ctx, &image[..x], w, codings, false, None, &mut out[..y], &mut workspace)
        } else {
            sizes.input_gradient(&ctx, &image[..y], w, codings, None, &mut out[..x], &mut workspace)
        };
        assert!(result.is_ok() || out.iter().all(|&x| x == 7.0), "a write before an error");
        result
    };
    let kept = KeptKernel { layout: &layout, groups: 1, bytes: &bytes };
    let short = KeptKernel { bytes: &bytes[1..], ..kept };
    let groups = Convolution { channels: [64, 64], groups: 2, ..sizes };
    let taps = Convolution { kernel: [1, 3, 2], output: [1, 6, 6], ..sizes };
    for (sizes, kept, forward) in [(sizes, short, true), (sizes, kept, false), (groups, kept, true), (taps, kept, true)]
    {
        let result = run(sizes, kept, nibbles, forward);
        assert!(matches!(result, Err(Error::Shape { .. })), "{result:?}");
    }
    let result = run(sizes, kept, line(6, 16), true);
    assert!(matches!(result, Err(Error::Format { .. })), "{result:?}");
    run(sizes, kept, nibbles, true).unwrap();
}

#[test]
fn short_blocks_after_long_ones() {
    // Hunted: steps behind a short block's end that still hold what an earlier call left there.
    let sizes = Convolution { channels: [72, 72], input: [1, 3, 5], output: [1, 3, 5], ..SQUARE };
    let long = Convolution { channels: [128, 128], ..sizes };
    let cases = [(long, 4), (sizes, 4), (long, 8), (sizes, 8)];
    let case = |(sizes, bits)| plain(sizes, false, [line(bits, 64); 2], Rounding::NearestEven);
    check_cases(&contexts(), cases.map(case).into_iter());
}

#[test]
fn teams_of_any_size_give_the_same_bits() {
    // Large enough that all of it is shared out.
    let pool = Pool::new();
    let sizes = Convolution { channels: [32, 64], input: [1, 12, 12], output: [1, 12, 12], ..SQUARE };
    let cases = [
        plain(sizes, false, [line(4, 64), line(6, 64)], Rounding::Stochastic),
        plain(
            Convolution { batch: 5, channels: [24, 48], groups: 2, ..sizes },
            true,
            [line(4, 32); 2],
            Rounding::Stochastic,
        ),
        plain(Convolution { channels: [12, 8], ..sizes }, true, [line(12, 16); 2], Rounding::Stochastic),
        // Rows of pixels so long that a task ends within one.
        plain(
            Convolution {
                batch: 1,
                channels: [3, 8],
                input: [1, 3, 1301],
                output: [1, 2, 651],
                kernel: [1, 3, 5],
                stride: [1, 2, 2],
                padding: [0, 1, 4],
                dilation: [1, 1, 2],
                ..SQUARE
            },
            true,
            [line(4, 64); 2],
            Rounding::NearestEven,
        ),
    ];
    for (number, case) in cases.iter().enumerate() {
        let expected = case.expected();
        for (name, ctx) in contexts() {
            let keep = |ctx: &Context<'_>, workspace: &mut Workspace| {
                [Place::Input, Place::Output].map(|place| case.keep(ctx, place, workspace))
            };
            let kept = keep(&ctx, &mut Workspace::default());
            let mut workspace = Workspace::default();
            for threads in [1, 3, 2] {
                let ctx = Context { team: &pool, threads, ..ctx };
                let what = || format!("{name}, {threads} threads: case {number}");
                case.check(&case.run(&ctx, &mut workspace), &expected, &what);
                assert!(keep(&ctx, &mut workspace) == kept, "{}: other bytes kept", what());
            }
        }
    }
}

#[test]
fn kept_bytes_are_the_same_after_any_call() {
    // Hunted: places that no product reads and nobody writes. (Levels differ in how many panels they flag.)
    let mut rng = TestRng(53);
    let levels = contexts();
    let mut workspaces: Vec<_> = levels.iter().map(|_| Workspace::default()).collect();
    // The last of them is a single line, which is contiguous and no strip.
    let pixel = Convolution { batch: 20, channels: [1, 1], input: [1; 3], output: [1; 3], kernel: [1; 3], ..SQUARE };
    let pixel = plain(Convolution { padding: [0; 3], ..pixel }, false, [line(4, 16); 2], Rounding::NearestEven);
    let large = Convolution { batch: 40, channels: [32, 1], ..SQUARE };
    let large = plain(large, false, [line(4, 16); 2], Rounding::NearestEven);
    let drawn = (0..60).map(|_| draw(&mut rng, &[2, 3, 4, 5, 6, 7, 8], 9));
    for (number, case) in drawn.chain([large, pixel]).enumerate() {
        for ((name, ctx), workspace) in levels.iter().zip(&mut workspaces) {
            for place in [Place::Input, Place::Output] {
                let expected = case.keep(ctx, place, &mut Workspace::default());
                let found = case.keep(ctx, place, workspace);
                assert!(found == expected, "{name}: case {number}, {place:?} of {:?}", case.sizes);
            }
        }
    }
}

#[test]
fn kept_bytes_of_any_content_are_read_inside_their_bounds() {
    // Hunted: an index, a shift or a sum that trusts a file. What comes out is anybody's guess.
    let mut rng = TestRng(54);
    for _ in 0..60 {
        let case = draw(&mut rng, &[2, 3, 4, 5, 6, 7, 8], 5);
        let codings = case.codings[2];
        let [channels, columns] = case.group_channels();
        for (_, ctx) in contexts() {
            let [dy, x]: [Box<[u8]>; 2] =
                [(Place::Output, codings[0]), (Place::Input, codings[1])].map(|(place, coding)| {
                    let len = case.sizes.kept_bytes(&ctx, place, coding.format).unwrap();
                    (0..len).map(|_| rng.next_u64() as u8).collect()
                });
            let mut out = Guarded::new(case.sizes.groups * count(case.sizes.kernel) * channels * columns, f32::NAN);
            let mut workspace = Workspace::default();
            let mut multiply = |dy: &[u8], x: &[u8]| {
                let (dy, x) = (Input::Kept(dy), Input::Kept(x));
                case.sizes.weight_gradient(&ctx, dy, x, codings, out.elements(), &mut workspace)
            };
            multiply(&dy, &x).unwrap();
            for error in [multiply(&dy[1..], &x), multiply(&dy, &x[1..])] {
                assert!(matches!(error, Err(Error::Shape { .. })), "{error:?}");
            }
            let _ = out.checked();
        }
    }
}

#[test]
fn empty_tensors() {
    let levels = contexts();
    let sizes = Convolution { channels: [8, 8], ..SQUARE };
    let cases = [
        Convolution { batch: 0, ..sizes },
        // No input pixels: all of Y is the bias, through taps that see padding alone.
        Convolution { input: [1, 0, 3], ..sizes },
        Convolution { output: [1, 6, 0], ..sizes },
        // An empty reduction.
        Convolution { channels: [0, 8], ..sizes },
        Convolution { channels: [8, 0], ..sizes },
    ];
    for sizes in cases {
        for bits in [4, 12] {
            for flatten in [false, true] {
                let mut case = plain(sizes, flatten, [line(bits, 16); 2], Rounding::Stochastic);
                case.biases[0] = Some(Fill::Plain.values(sizes.channels[0], 5));
                check_cases(&levels, [case].into_iter());
            }
        }
    }
}

#[test]
fn sizes_that_fit_nothing_are_errors() {
    // Hunted: products of sizes that wrap around, and tables that are made before anything was checked.
    let ctx = Context::serial();
    let coding = Coding { format: line(4, 16), mode: mode(Rounding::Stochastic, 1) };
    let sizes = Convolution { channels: [8, 8], ..SQUARE };
    let huge = 1usize << 40;
    let geometries = [
        Convolution { groups: 0, ..sizes },
        Convolution { groups: 3, ..sizes },
        Convolution { stride: [1, 0, 1], ..sizes },
        Convolution { dilation: [0, 1, 1], ..sizes },
        Convolution { kernel: [1, 3, 0], ..sizes },
        Convolution { stride: [1, usize::MAX, 1], ..sizes },
        Convolution { padding: [usize::MAX, 0, 0], ..sizes },
        Convolution { dilation: [1, 1, huge], ..sizes },
        Convolution { kernel: [huge, huge, 1], ..sizes },
        Convolution { kernel: [1 << 30, 3, 3], ..sizes },
        Convolution { kernel: [1 << 20, 1 << 20, 1 << 24], ..sizes },
        Convolution { input: [huge, 0, 1], ..sizes },
        Convolution { input: [1 << 20, 1 << 20, 1 << 24], ..sizes },
        Convolution { output: [1, huge, 0], ..sizes },
        Convolution { output: [1 << 16, 1 << 16, 1], ..sizes },
        Convolution { batch: huge, ..sizes },
        Convolution { batch: (1 << 31) - 1, channels: [1 << 40, 0], ..sizes },
        Convolution { batch: 1 << 30, channels: [1 << 62, 1 << 62], ..sizes },
        // Sizes that are fine, but not those of the tensors.
        Convolution { batch: 3, ..sizes },
        Convolution { output: [1 << 10, 1 << 10, 1 << 10], ..sizes },
        Convolution { kernel: [1 << 10, 1 << 10, 1 << 10], ..sizes },
        Convolution { channels: [8, 16], ..sizes },
    ];
    let image = vec![0.0; 2 * 36 * 8];
    let kernel = vec![0.0; 8 * 8 * 9];
    let w = FloatTensor::new(&kernel, &[8, 8, 1, 3, 3]).unwrap();
    for (i, sizes) in geometries.into_iter().enumerate() {
        let mut workspace = Workspace::default();
        let shape_error =
            |result: hbfp::Result<()>| assert!(matches!(result, Err(Error::Shape { .. })), "{i}: {result:?}");
        // Tensors of the usual sizes, and empty ones, to which a product that wraps around might be equal.
        for (image, out) in [(&image[..], image.len()), (&[][..], 0)] {
            let mut out = vec![7.0; out];
            shape_error(sizes.forward(
                &ctx,
                image,
                Kernel::Floats(&w),
                [coding; 2],
                false,
                None,
                &mut out,
                &mut workspace,
            ));
            shape_error(sizes.forward(
                &ctx,
                image,
                Kernel::Floats(&w),
                [coding; 2],
                true,
                None,
                &mut out,
                &mut workspace,
            ));
            shape_error(sizes.input_gradient(
                &ctx,
                image,
                Kernel::Floats(&w),
                [coding; 2],
                None,
                &mut out,
                &mut workspace,
            ));
            let x = Input::Floats(image);
            shape_error(sizes.weight_gradient(&ctx, x, x, [coding; 2], &mut out, &mut workspace));
            assert!(out.iter().all(|&x| x == 7.0), "{i}: a write before an error");
        }
        for place in [Place::Input, Place::Output] {
            let kept = sizes.kept_bytes(&ctx, place, coding.format).filter(|&n| n < 1 << 20);
            let result = sizes.keep(&ctx, place, &image, coding, &mut vec![0; kept.unwrap_or(0)], &mut workspace);
            assert!(result.is_err() || sizes.check().is_ok(), "{i}");
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_errors() {
    let ctx = Context::serial();
    let case = plain(Convolution { channels: [8, 8], ..SQUARE }, false, [line(4, 16); 2], Rounding::NearestEven);
    let coding = |format| Coding { format, mode: mode(Rounding::NearestEven, 1) };
    let (sizes, w, mut workspace) = (case.sizes, case.w.view(), Workspace::default());
    let mut out = vec![0.0; case.dy.len()];
    let mut forward = |codings: [BlockFormat; 2], bias: Option<&[f32]>| {
        sizes.forward(&ctx, &case.x, Kernel::Floats(&w), codings.map(coding), false, bias, &mut out, &mut workspace)
    };
    let tile = BlockFormat::new(4, BlockShape::Tile(4)).unwrap();
    assert!(matches!(forward([tile, line(4, 4)], None), Err(Error::Format { .. })));
    assert!(matches!(forward([line(4, 4), line(4, 3)], None), Err(Error::Shape { .. })));
    assert!(matches!(forward([line(4, 4); 2], Some(&[0.0; 7])), Err(Error::Shape { .. })));
    assert!(forward([line(4, 8), line(4, 16)], Some(&[0.0; 8])).is_ok(), "one block of 8 channels either way");
    // Wide codes are not kept, nor can somebody claim to have kept them.
    let (wide, mut dw) = (coding(line(12, 16)), vec![0.0; 8 * 8 * 9]);
    for (place, image) in [(Place::Input, &case.x), (Place::Output, &case.dy)] {
        let result = sizes.keep(&ctx, place, image, wide, &mut [], &mut workspace);
        assert!(matches!(result, Err(Error::Format { .. })), "{result:?}");
    }
    let (kept, floats) = (Input::Kept(&[]), Input::Floats(&case.dy));
    for [dy, x] in [[floats, kept], [kept, floats]] {
        let result = sizes.weight_gradient(&ctx, dy, x, [wide; 2], &mut dw, &mut workspace);
        assert!(matches!(result, Err(Error::Format { .. })), "{result:?}");
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "the floating-point mode is a register")]
fn the_callers_floating_point_mode_plays_no_part() {
    // Hunted: a path outside the team's regions, where the caller's flushing of subnormals is still in force.
    let with_flushing = |run: &mut dyn FnMut()| {
        let (mut saved, flushing) = (0u32, 0x9FC0u32);
        // SAFETY: flush to zero and denormals are zero, until the end of the call.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut saved, options(nostack));
            std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const flushing, options(nostack));
        }
        run();
        // SAFETY: what was read above.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const saved, options(nostack)) }
    };
    for (bits, channels) in [(4, [8, 8]), (12, [8, 8]), (4, [0, 8]), (12, [0, 8])] {
        for flatten in [false, true] {
            let mut case =
                plain(Convolution { channels, ..SQUARE }, flatten, [line(bits, 16); 2], Rounding::NearestEven);
            for values in [&mut case.x, &mut case.dy, case.biases[1].as_mut().unwrap()] {
                values.iter_mut().for_each(|x| *x *= 2f32.powi(-126));
            }
            let expected = case.expected();
            assert!(expected[0].iter().any(|x| x.is_subnormal()), "the case hunts nothing");
            for (name, ctx) in contexts() {
                let mut found = None;
                with_flushing(&mut || found = Some(case.run(&ctx, &mut Workspace::default())));
                case.check(&found.unwrap(), &expected, &|| format!("{name}, subnormals flushed"));
            }
        }
    }
}

/// The levels themselves, for valgrind: models check their indices.
fn levels() -> Vec<(&'static str, Context<'static>)> {
    let levels = Level::ALL.into_iter().filter(|level| level.is_available());
    levels.map(|level| (level.name(), serial(Kernels::of(level)))).collect()
}

#[test]
fn memcheck_convolutions() {
    let mut rng = TestRng(55);
    let levels = levels();
    // A workspace of its own for each case: its buffers are of just the size that is asked for.
    for _ in 0..12 {
        check_cases(&levels, [draw(&mut rng, &[2, 4, 4, 6, 8], 4)].into_iter());
    }
    check_cases(&levels, [draw(&mut rng, &[12], 3)].into_iter());
}

#[test]
fn memcheck_threads() {
    let pool = Pool::new();
    let case =
        plain(Convolution { channels: [24, 36], groups: 2, ..SQUARE }, false, [line(4, 16); 2], Rounding::Stochastic);
    let expected = case.expected();
    for (name, ctx) in levels() {
        let ctx = Context { team: &pool, threads: 3, ..ctx };
        case.check(&case.run(&ctx, &mut Workspace::default()), &expected, &|| format!("{name}, three threads"));
    }
}
