//! Which pixels taps connect.

use std::ops::Range;

/// In place of a coordinate or a pixel that does not exist.
pub(super) const NOWHERE: i32 = -1;

/// For each dimension by itself: the coordinates on the other side that the taps of a coordinate lead to, or [`NOWHERE`].
pub(super) struct AxisReach {
    rows: [usize; 3],
    kernel: [usize; 3],
    target: [i32; 3],
    tables: [Vec<i32>; 3],
}

impl AxisReach {
    /// `source` gives the coordinate on the other side for a dimension, a coordinate and a tap.
    pub(super) fn new(
        rows: [usize; 3],
        kernel: [usize; 3],
        target: [usize; 3],
        source: impl Fn(usize, usize, usize) -> Option<usize>,
    ) -> Self {
        let tables = [0, 1, 2].map(|d| {
            let entry = |i: usize| source(d, i / kernel[d], i % kernel[d]).map_or(NOWHERE, |p| p as i32);
            (0..rows[d] * kernel[d]).map(entry).collect()
        });
        Self { rows, kernel, target: target.map(|n| n as i32), tables }
    }

    /// How many pixels have taps.
    pub(super) fn pixels(&self) -> usize {
        self.rows.iter().product()
    }

    pub(super) fn taps(&self) -> usize {
        self.kernel.iter().product()
    }

    /// Pixels of a row.
    pub(super) fn row(&self) -> usize {
        self.rows[2]
    }

    /// The pixels of a row that the tap leads anywhere along it, and where it leads the first of them.
    pub(super) fn along_rows(&self, tap: usize) -> (Range<usize>, usize) {
        let to = |pixel: usize| self.tables[2][pixel * self.kernel[2] + tap];
        let mut leads = (0..self.rows[2]).filter(|&pixel| to(pixel) != NOWHERE);
        let Some(first) = leads.next() else { return (0..0, 0) };
        (first..leads.next_back().unwrap_or(first) + 1, to(first) as usize)
    }

    /// The taps of a pixel row by row: where the row of pixels begins that they lead to, or [`NOWHERE`], and the coordinates
    /// in it, the same for all rows.
    pub(super) fn of(&self, pixel: usize) -> (impl Iterator<Item = i32>, &[i32]) {
        let [[_, n1, n2], [k0, k1, k2]] = [self.rows, self.kernel];
        let [_, t1, t2] = self.target;
        let [first, second, third] = &self.tables;
        let seconds = &second[pixel / n2 % n1 * k1..][..k1];
        let begin = move |a: i32, b: i32| if a | b < 0 { NOWHERE } else { (a * t1 + b) * t2 };
        let begins = first[pixel / (n1 * n2) * k0..][..k0].iter();
        (begins.flat_map(move |&a| seconds.iter().map(move |&b| begin(a, b))), &third[pixel % n2 * k2..][..k2])
    }
}

/// Pixels that taps connect: for each pixel of a product's rows and each tap that on the other side, or [`NOWHERE`].
pub(super) struct Reach {
    taps: usize,
    pixels: Vec<i32>,
}

impl Reach {
    pub(super) fn new(axes: &AxisReach) -> Self {
        let (count, taps) = (axes.pixels(), axes.taps());
        let mut pixels = Vec::with_capacity((count + 1) * taps);
        for pixel in 0..count {
            let (begins, columns) = axes.of(pixel);
            for begin in begins {
                pixels.extend(columns.iter().map(|c| if begin | c < 0 { NOWHERE } else { begin + c }));
            }
        }
        pixels.resize((count + 1) * taps, NOWHERE);
        Self { taps, pixels }
    }

    /// Sources of the taps of all pixels.
    pub(super) fn all(&self) -> &[i32] {
        &self.pixels[..self.pixels.len() - self.taps]
    }

    /// Sources of the taps of a pixel; of the one behind the last, none.
    pub(super) fn of(&self, pixel: usize) -> &[i32] {
        &self.pixels[pixel * self.taps..][..self.taps]
    }
}
