//! Which pixels taps connect, and where the encoded lines of the pixels lie that a product's rows are made of.
#![allow(unsafe_code, reason = "flags of panels that another stage has written")]

use crate::arch::generic::product::PANEL_ROWS;
use crate::encode::panels::PanelsRef;

/// Pixels that taps connect: for each pixel of a product's rows and each tap that on the other side, or [`NOWHERE`].
pub(super) struct Reach {
    pub(super) rows: usize,
    taps: usize,
    pixels: Vec<i32>,
    /// For each pixel that distance which leads from the sources of all its taps to those of the next pixel, and on to the
    /// third one after it; 0 where there is none, as at the image's edges.
    apart: Vec<i32>,
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
        let apart = (0..tables).map(|pixel| {
            let Some(four) = pixels.get(pixel * taps..(pixel + PANEL_ROWS) * taps) else { return 0 };
            let (first, rest) = four.split_at(taps);
            let apart = rest[0] - first[0];
            let equal = |(i, &source): (usize, &i32)| {
                let lane = 1 + (i / taps) as i32;
                source != NOWHERE && first[i % taps] != NOWHERE && source - first[i % taps] == lane * apart
            };
            if apart > 0 && rest.iter().enumerate().all(equal) { apart } else { 0 }
        });
        let apart = apart.collect();
        Self { rows: tables, taps, pixels, apart }
    }

    /// Sources of the taps of a pixel; of the one behind the last, none.
    pub(super) fn of(&self, pixel: usize) -> &[i32] {
        &self.pixels[pixel * self.taps..][..self.taps]
    }
}

/// Rows of a product by pixels.
pub(super) struct Rows {
    pub(super) reach: Reach,
    /// Pixels of the image.
    pub(super) pixels: usize,
    /// Channels of the image, and columns, of a group.
    pub(super) channels: usize,
    pub(super) out_channels: usize,
    pub(super) columns: usize,
}

/// Encoded lines of an image.
pub(super) struct Lines {
    pub(super) panels: PanelsRef,
    /// Bytes of a line.
    pub(super) bytes: usize,
    pub(super) groups: usize,
    pub(super) g: usize,
    pub(super) pixels: usize,
    /// Whether any of them needs the general product.
    pub(super) any_general: bool,
    /// In place of a line of a pixel that does not exist. Zeros have zeros for correction and rider, too.
    pub(super) zeros: *const u8,
}

impl Lines {
    /// Where the lines of some rows are for some taps: four rows at a time, tap by tap. Sets the flags of those four with
    /// a block that needs the general product.
    pub(super) fn find(
        &self,
        rows: &Rows,
        range: std::ops::Range<usize>,
        taps: std::ops::Range<usize>,
        starts: &mut Vec<*const u8>,
        general: &mut [bool],
    ) {
        let row_pixels = rows.reach.rows;
        let between = (self.groups * self.bytes) as isize;
        starts.resize(range.len().next_multiple_of(PANEL_ROWS) * taps.len(), self.zeros);
        let mut to = starts.as_chunks_mut::<PANEL_ROWS>().0.iter_mut();
        let (mut sample, mut pixel) = (range.start / row_pixels, range.start % row_pixels);
        for (row, general) in range.clone().step_by(PANEL_ROWS).zip(general) {
            let apart = rows.reach.apart[pixel] as isize;
            if apart > 0 && row + PANEL_ROWS <= range.end && !self.any_general {
                let line = sample * self.pixels * self.groups + self.g;
                let first = self.panels.bytes.wrapping_add(line * self.bytes);
                for (&source, to) in rows.reach.of(pixel)[taps.clone()].iter().zip(&mut to) {
                    let line = first.wrapping_offset(source as isize * between);
                    *to = [0, 1, 2, 3].map(|lane| line.wrapping_offset(lane * apart * between));
                }
                *general = false;
                pixel += PANEL_ROWS;
                if pixel == row_pixels {
                    (sample, pixel) = (sample + 1, 0);
                }
                continue;
            }
            let mut first = [0; PANEL_ROWS];
            // Rows past the last have no sources.
            let mut sources = [&rows.reach.of(row_pixels)[taps.clone()]; PANEL_ROWS];
            for lane in 0..PANEL_ROWS.min(range.end - row) {
                first[lane] = sample * self.pixels * self.groups + self.g;
                sources[lane] = &rows.reach.of(pixel)[taps.clone()];
                pixel += 1;
                if pixel == row_pixels {
                    (sample, pixel) = (sample + 1, 0);
                }
            }
            let lines = first.map(|line| self.panels.bytes.wrapping_add(line * self.bytes));
            let [a, b, c, d] = sources;
            for ((((&a, &b), &c), &d), to) in a.iter().zip(b).zip(c).zip(d).zip(&mut to) {
                for (lane, source) in [a, b, c, d].into_iter().enumerate() {
                    let line = lines[lane].wrapping_offset(source as isize * between);
                    to[lane] = if source == NOWHERE { self.zeros } else { line };
                }
            }
            *general = false;
            if self.any_general {
                for (first, sources) in first.iter().zip(sources) {
                    for &source in sources.iter().filter(|&&source| source != NOWHERE) {
                        let line = first + source as usize * self.groups;
                        // SAFETY: a line of the image, whose panel was written by the stage before.
                        *general |= unsafe { self.panels.is_general(line / PANEL_ROWS) };
                    }
                }
            }
        }
    }
}
