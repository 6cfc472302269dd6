//! Which pixels taps connect, one by one.

/// Pixels that taps connect: for each pixel of a product's rows and each tap that on the other side, or [`NOWHERE`].
pub(super) struct Reach {
    pub(super) rows: usize,
    taps: usize,
    pixels: Vec<i32>,
}

/// In place of a pixel that does not exist.
pub(super) const NOWHERE: i32 = -1;

impl Reach {
    /// `source` gives the coordinate on the other side for a dimension, a coordinate and a tap.
    pub(super) fn new(
        rows: [usize; 3],
        kernel: [usize; 3],
        target: [usize; 3],
        source: impl Fn(usize, usize, usize) -> Option<usize>,
    ) -> Self {
        let [tables, taps] = [rows, kernel].map(|sizes| sizes.iter().product::<usize>());
        let table = |d: usize| -> Vec<i32> {
            let entry = |i: usize| source(d, i / kernel[d], i % kernel[d]).map_or(NOWHERE, |p| p as i32);
            (0..rows[d] * kernel[d]).map(entry).collect()
        };
        let [first, second, third] = [table(0), table(1), table(2)];
        let [k0, k1, k2] = kernel;
        let [_, t1, t2] = target.map(|n| n as i32);
        let mut pixels = Vec::with_capacity((tables + 1) * taps);
        for i in 0..rows[0] {
            for j in 0..rows[1] {
                for k in 0..rows[2] {
                    for a in &first[i * k0..][..k0] {
                        for b in &second[j * k1..][..k1] {
                            let base = if a | b < 0 { NOWHERE } else { (a * t1 + b) * t2 };
                            pixels.extend(
                                third[k * k2..][..k2].iter().map(|c| if base | c < 0 { NOWHERE } else { base + c }),
                            );
                        }
                    }
                }
            }
        }
        pixels.resize((tables + 1) * taps, NOWHERE);
        Self { rows: tables, taps, pixels }
    }

    /// Sources of the taps of all pixels.
    pub(super) fn all(&self) -> &[i32] {
        &self.pixels[..self.rows * self.taps]
    }

    /// Sources of the taps of a pixel; of the one behind the last, none.
    pub(super) fn of(&self, pixel: usize) -> &[i32] {
        &self.pixels[pixel * self.taps..][..self.taps]
    }
}
