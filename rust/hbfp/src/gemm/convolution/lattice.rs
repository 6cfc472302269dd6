//! Pixels of a product that meet the same taps, and where in the other image these find what they multiply.
//!
//! Forward all pixels of Y meet all taps. Against a stride s only every s-th pixel of X each way meets the same taps of the
//! kernel: the pixels fall into lattices, each with taps of its own, and no tap of a lattice falls between the steps.
//! Taps that meet nothing but padding are left out.

use super::{Convolution, Taps};

/// One lattice.
pub(super) struct Lattice {
    /// Its pixels each way.
    pub(super) count: [usize; 3],
    /// The first of them in the product's image, and the distance of the next.
    pub(super) first: [usize; 3],
    pub(super) step: [usize; 3],
    /// The distance in the other image of what a tap finds for a pixel and for the next.
    pub(super) pitch: [usize; 3],
    /// Its taps, in the kernel's order.
    pub(super) taps: Vec<usize>,
    /// Where each tap finds what it multiplies for the first pixel.
    pub(super) sources: Vec<[isize; 3]>,
}

/// A lattice's share in one dimension.
struct Axis {
    count: usize,
    first: usize,
    step: usize,
    pitch: usize,
    taps: Vec<(usize, isize)>,
}

/// All lattices of a product.
pub(super) struct Lattices {
    pub(super) all: Vec<Lattice>,
    /// Whether a pixel leaves out a tap that only padding, or nothing, lies under.
    pub(super) leave_out: bool,
}

impl Lattices {
    pub(super) fn new(convolution: &Convolution, taps: Taps) -> Self {
        let [first, second, third] = [0, 1, 2].map(|d| axes(convolution, taps, d));
        let [_, k1, k2] = convolution.kernel;
        let mut all = Vec::with_capacity(first.len() * second.len() * third.len());
        for a in &first {
            for b in &second {
                for c in &third {
                    let axes = [a, b, c];
                    let (mut taps, mut sources) = (Vec::new(), Vec::new());
                    for &(i, x) in &a.taps {
                        for &(j, y) in &b.taps {
                            for &(k, z) in &c.taps {
                                taps.push((i * k1 + j) * k2 + k);
                                sources.push([x, y, z]);
                            }
                        }
                    }
                    all.push(Lattice {
                        count: axes.map(|axis| axis.count),
                        first: axes.map(|axis| axis.first),
                        step: axes.map(|axis| axis.step),
                        pitch: axes.map(|axis| axis.pitch),
                        taps,
                        sources,
                    });
                }
            }
        }
        let leave_out = all.iter().any(|lattice| lattice.taps.len() < convolution.taps());
        Self { all, leave_out }
    }

    /// The taps of all lattices, one after the other.
    pub(super) fn order(&self) -> Vec<usize> {
        self.all.iter().flat_map(|lattice| &lattice.taps).copied().collect()
    }

    /// The margin that the other image, of so many pixels, needs before and after them, so that all taps stay inside.
    pub(super) fn margin(&self, pixels: [usize; 3]) -> [[usize; 3]; 2] {
        let mut margin = [[0; 3]; 2];
        for lattice in &self.all {
            for d in 0..3 {
                let way = ((lattice.count[d] - 1) * lattice.pitch[d]) as isize;
                for source in &lattice.sources {
                    let after = source[d] + way + 1 - pixels[d] as isize;
                    margin[0][d] = margin[0][d].max((-source[d]).max(0) as usize);
                    margin[1][d] = margin[1][d].max(after.max(0) as usize);
                }
            }
        }
        margin
    }
}

/// In dimension `d`, the pixels of the product that meet the same taps.
fn axes(convolution: &Convolution, taps: Taps, d: usize) -> Vec<Axis> {
    let [stride, padding, dilation, kernel] =
        [convolution.stride, convolution.padding, convolution.dilation, convolution.kernel].map(|sizes| sizes[d]);
    let (input, output) = (convolution.input[d], convolution.output[d]);
    let [stride_, padding_, dilation_] = [stride, padding, dilation].map(|n| n as isize);
    let axis =
        |count: usize, first: usize, step: usize, pitch: usize, found: &dyn Fn(isize) -> Option<isize>, size: usize| {
            // The first pixel whose tap lies past the beginning is still there, and its tap not past the end.
            let meets = |&(_, source): &(usize, isize)| {
                let skipped = (-source).max(0) as usize;
                let i = skipped.div_ceil(pitch);
                i < count && source + ((i * pitch) as isize) < size as isize
            };
            let taps = (0..kernel).filter_map(|k| Some((k, found(k as isize)?))).filter(meets).collect();
            Axis { count, first, step, pitch, taps }
        };
    match taps {
        Taps::Forward => vec![axis(output, 0, 1, stride, &|k| Some(k * dilation_ - padding_), input)],
        Taps::Backward => (0..stride.min(input))
            .map(|first| {
                let found = |k: isize| {
                    let distance = first as isize + padding_ - k * dilation_;
                    (distance.rem_euclid(stride_) == 0).then(|| distance.div_euclid(stride_))
                };
                axis((input - first).div_ceil(stride), first, stride, 1, &found, output)
            })
            .collect(),
    }
}
