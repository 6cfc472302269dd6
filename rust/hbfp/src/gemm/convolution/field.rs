//! An image in encoded lines, one for each pixel and group, with a margin of zero lines: so every tap finds a line, and finds
//! it at the same distance from every pixel. Random bits come row by row and never lie in memory for long.
#![allow(unsafe_code, reason = "calls of kernels, and tasks that write disjoint rows")]

use super::lattice::Lattice;
use super::prepared::{Image, row_bits};
use super::product_of;
use crate::arch::generic::encode::{BlockPlace, LineRun, PanelCoding, ROW_PADDING, encodes_lines};
use crate::arch::generic::product::{Correction, PANEL_ROWS};
use crate::encode::blocks::Scratch;
use crate::encode::panels::{PanelLayout, PanelsMut, PanelsRef};
use crate::encode::{Context, forms};
use crate::gemm::Coding;
use std::ops::Range;

/// Where lines lie.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) image: Image,
    pub(super) groups: usize,
    /// Pixels of the margin before those of the image.
    before: [usize; 3],
    /// Pixels each way, the margin included.
    pixels: [usize; 3],
    /// Bytes of a line.
    line: usize,
}

impl Shape {
    /// Elements that a task encodes, about.
    const TOGETHER: usize = 1 << 14;

    /// `layout`: of a line, as a row of a left operand.
    pub(super) fn new(image: Image, groups: usize, [before, after]: [[usize; 3]; 2], layout: &PanelLayout) -> Self {
        let pixels = [0, 1, 2].map(|d| before[d] + image.pixels[d] + after[d]);
        Self { image, groups, before, pixels, line: layout.blocks * layout.block_bytes / PANEL_ROWS }
    }
    /// Pixels of a sample, the margin included; None: more than a product of some billion elements would have.
    pub(super) fn sample_pixels([before, after]: [[usize; 3]; 2], image: Image) -> Option<usize> {
        (0..3)
            .try_fold(1usize, |all, d| all.checked_mul(before[d] + image.pixels[d] + after[d]))
            .filter(|&n| n < 1 << 40)
    }
    /// Rows of pixels of all samples.
    pub(super) fn rows(&self) -> usize {
        self.image.batch * self.pixels[0] * self.pixels[1]
    }
    fn row_bytes(&self) -> usize {
        self.pixels[2] * self.groups * self.line
    }
    pub(super) fn bytes(&self) -> usize {
        self.rows() * self.row_bytes()
    }
    fn rows_together(&self) -> usize {
        (Self::TOGETHER / (self.image.pixels[2] * self.image.channels).max(1)).max(1)
    }
    pub(super) fn tasks(&self) -> usize {
        self.rows().div_ceil(self.rows_together())
    }
    /// The distance of a lattice's sources, in lines of one group: of the next pixel each way, and of its taps.
    fn distances(&self, lattice: &Lattice) -> ([usize; 3], Vec<usize>) {
        let [_, p1, p2] = self.pixels;
        let [s0, s1, s2] = lattice.pitch;
        let line = |at: [usize; 3]| (at[0] * p1 + at[1]) * p2 + at[2];
        let source =
            |source: &[isize; 3]| line([0, 1, 2].map(|d| source[d].wrapping_add_unsigned(self.before[d]) as usize));
        ([s0 * p1 * p2, s1 * p2, s2], lattice.sources.iter().map(source).collect())
    }
}

/// What encodes an image.
pub(super) struct Encoding<'a> {
    pub(super) shape: Shape,
    pub(super) x: &'a [f32],
    pub(super) coding: Coding,
    pub(super) layout: PanelLayout,
    pub(super) correction: Correction,
    /// Its flags are those of rows of pixels.
    pub(super) lines: PanelsMut<'a>,
}

impl Encoding<'_> {
    /// Some rows of pixels.
    pub(super) fn fill(&self, ctx: &Context<'_>, task: usize, scratch: &mut Scratch) {
        let together = self.shape.rows_together();
        for row in task * together..((task + 1) * together).min(self.shape.rows()) {
            self.row(ctx, row, scratch);
        }
    }

    fn row(&self, ctx: &Context<'_>, row: usize, scratch: &mut Scratch) {
        let Shape { image, groups, before, pixels: [p0, p1, _], line } = self.shape;
        let [n0, n1, width] = image.pixels;
        let (sample, i0, i1) =
            (row / (p0 * p1), (row / p1 % p0).wrapping_sub(before[0]), (row % p1).wrapping_sub(before[1]));
        let row_bytes = self.shape.row_bytes();
        // SAFETY: a row belongs to one task.
        let to = unsafe { self.lines.bytes.part(row * row_bytes, row_bytes) };
        if i0 >= n0 || i1 >= n1 {
            return to.fill(0);
        }
        let (from, len) = (before[2] * groups * line, width * groups * line);
        to[..from].fill(0);
        to[from + len..].fill(0);
        let to = &mut to[from..from + len];
        let image_row = i0 * n1 + i1;
        let x = &self.x[(sample * n0 * n1 + image_row) * width * image.channels..][..width * image.channels];
        let mut bits = std::mem::take(&mut scratch.bits);
        if self.coding.mode.is_stochastic() {
            bits.resize(bits.len().max(x.len() + ROW_PADDING), 0);
            row_bits(ctx.kernels, image, 0..image.channels, self.coding.mode.seed, [sample, image_row], &mut bits);
        }
        let coding = PanelCoding::new(self.coding.format, self.layout.offset(), Some(self.correction));
        let PanelLayout { k, block, blocks, steps, block_bytes, .. } = self.layout;
        let line_block = block_bytes / PANEL_ROWS;
        let mut general = false;
        for b in 0..blocks {
            let n = block.min(k - b * block);
            if n == 4 * steps && encodes_lines(n, ctx.kernels.columns / 2, self.correction) {
                let encode = ctx.kernels.encode_lines[self.coding.mode.rounding as usize];
                let of = LineRun {
                    lines: width * groups,
                    x: x[b * block..].as_ptr(),
                    random: bits.as_ptr().wrapping_add(b * block),
                    stride: k,
                    to: to[b * line_block..].as_mut_ptr(),
                    pitch: line,
                };
                // SAFETY: lines of k elements follow each other, their random bits too, and what becomes of them.
                general |= unsafe { encode(&of, n, &coding) };
            } else {
                general |= self.odd_blocks(ctx, b, x, &bits, &coding, to, scratch);
            }
        }
        if general {
            self.lines.set_general(row);
        }
        scratch.bits = bits;
    }

    /// Block `b` of a row's lines where no kernel writes it line by line.
    fn odd_blocks(
        &self,
        ctx: &Context<'_>,
        b: usize,
        x: &[f32],
        bits: &[u16],
        coding: &PanelCoding,
        to: &mut [u8],
        scratch: &mut Scratch,
    ) -> bool {
        let PanelLayout { k, block, steps, block_bytes, .. } = self.layout;
        let (line, line_block, n) = (self.shape.line, block_bytes / PANEL_ROWS, block.min(k - b * block));
        let lines = to.len() / line;
        let panel = scratch.strips.reserve(block_bytes).as_ptr();
        let step = self.layout.step() * PANEL_ROWS;
        let place = BlockPlace { codes: panel, ends: panel.wrapping_add(step * steps), step, chunk: 0, steps };
        let encode = ctx.kernels.encode_rows[self.coding.mode.rounding as usize];
        let mut general = false;
        for first in (0..lines).step_by(PANEL_ROWS) {
            // In place of lines past the last one, that one again.
            let at: [usize; PANEL_ROWS] = std::array::from_fn(|i| (first + i).min(lines - 1));
            let from = at.map(|at| x[at * k + b * block..][..n].as_ptr());
            let bits = at.map(|at| bits.as_ptr().wrapping_add(at * k + b * block));
            let to = at.map(|at| to[at * line + b * line_block..][..line_block].as_mut_ptr());
            // SAFETY: n elements and their random bits; a panel's block; a line's block each.
            unsafe {
                general |= encode(&from, n, &bits, coding, &place);
                forms::to_lines(std::slice::from_raw_parts(panel, block_bytes), self.layout.step(), to);
            }
        }
        general
    }
}

/// Four rows of a product.
#[derive(Clone, Copy, Default)]
pub(super) struct Four {
    /// The first one's pixel among those of all samples.
    pub(super) pixel: usize,
    pub(super) height: usize,
}

/// The rows of a lattice, four by four, and the lines that they are made of.
pub(super) struct Fours<'a> {
    lattice: &'a Lattice,
    shape: Shape,
    /// Pixels of the product's image.
    pixels: [usize; 3],
    next: [usize; 3],
    taps: Vec<usize>,
    /// Whether the lattice is the whole image, so that four rows may go on in the next row of pixels, or sample.
    dense: bool,
}

/// A pixel of a lattice: the sample, and its coordinates.
#[derive(Clone, Copy)]
struct At {
    sample: usize,
    i: [usize; 3],
}

impl<'a> Fours<'a> {
    pub(super) fn new(lattice: &'a Lattice, shape: Shape, pixels: [usize; 3]) -> Self {
        let (next, taps) = shape.distances(lattice);
        Self { lattice, shape, pixels, next, taps, dense: lattice.step == [1; 3] }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        let [c0, c1, c2] = self.lattice.count;
        let rows = self.shape.image.batch * c0 * c1;
        if self.dense { (rows * c2).div_ceil(PANEL_ROWS) } else { rows * c2.div_ceil(PANEL_ROWS) }
    }

    /// Pixels of the product's image from a row to the next.
    pub(super) fn stride(&self) -> usize {
        self.lattice.step[2]
    }

    fn at(&self, four: usize) -> At {
        let [c0, c1, c2] = self.lattice.count;
        let (line, i2) = if self.dense {
            (four * PANEL_ROWS / c2, four * PANEL_ROWS % c2)
        } else {
            let fours = c2.div_ceil(PANEL_ROWS);
            (four / fours, four % fours * PANEL_ROWS)
        };
        At { sample: line / (c0 * c1), i: [line / c1 % c0, line % c1, i2] }
    }

    /// The first pixel of the next row of pixels.
    fn next_row(&self, At { sample, i: [i0, i1, _] }: At) -> At {
        let [c0, c1, _] = self.lattice.count;
        if i1 + 1 < c1 {
            At { sample, i: [i0, i1 + 1, 0] }
        } else if i0 + 1 < c0 {
            At { sample, i: [i0 + 1, 0, 0] }
        } else {
            At { sample: sample + 1, i: [0; 3] }
        }
    }

    /// The line, of group 0, that a tap at no distance would find.
    fn line(&self, At { sample, i }: At) -> usize {
        let [p0, p1, p2] = self.shape.pixels;
        sample * p0 * p1 * p2 + i[0] * self.next[0] + i[1] * self.next[1] + i[2] * self.next[2]
    }

    fn pixel(&self, At { sample, i }: At) -> usize {
        let (Lattice { first, step, .. }, [n0, n1, n2]) = (self.lattice, self.pixels);
        let at = [0, 1, 2].map(|d| first[d] + i[d] * step[d]);
        ((sample * n0 + at[0]) * n1 + at[1]) * n2 + at[2]
    }

    /// Rows of pixels of all samples, and the rows of four in each, if none of them goes on in the next.
    pub(super) fn in_rows(&self) -> Option<(usize, usize)> {
        let [c0, c1, c2] = self.lattice.count;
        let whole = c2.is_multiple_of(PANEL_ROWS);
        whole.then_some((self.shape.image.batch * c0 * c1, c2 / PANEL_ROWS))
    }

    /// Bytes from a row's lines to the next one's.
    pub(super) fn between(&self) -> usize {
        self.next[2] * self.shape.groups * self.shape.line
    }

    /// Bytes from a row's lines to those that the taps find, block by block.
    pub(super) fn offsets(&self, blocks: usize) -> Vec<usize> {
        let Shape { groups, line, .. } = self.shape;
        self.taps.iter().flat_map(|tap| (0..blocks).map(move |b| tap * groups * line + b * line / blocks)).collect()
    }

    /// Where row `row` of pixels begins: byte of its lines, of group `g`, and pixel of the product's image.
    pub(super) fn row(&self, row: usize, g: usize) -> (usize, usize) {
        let Shape { groups, line, .. } = self.shape;
        let at = self.at(row * (self.lattice.count[2] / PANEL_ROWS));
        ((self.line(at) * groups + g) * line, self.pixel(at))
    }

    /// Where some of them are, and four by four the lines of group `g` that some taps find, tap by tap. Sets the flags of
    /// those with a block that needs the general product.
    pub(super) fn find(
        &self,
        range: Range<usize>,
        taps: Range<usize>,
        g: usize,
        lines: PanelsRef,
        any_general: bool,
        starts: &mut Vec<*const u8>,
        fours: &mut Vec<Four>,
        general: &mut [bool],
    ) {
        let Shape { groups, line, pixels: [_, _, p2], image, .. } = self.shape;
        let between = groups * line;
        let taps = &self.taps[taps];
        let first = lines.bytes.wrapping_add(g * line);
        let width = self.lattice.count[2];
        fours.clear();
        starts.resize(range.len() * PANEL_ROWS * taps.len(), std::ptr::null());
        let mut to = starts.as_chunks_mut::<PANEL_ROWS>().0.iter_mut();
        let mut at = self.at(range.start);
        for (_, general) in range.zip(general) {
            let pixel = self.pixel(at);
            let mut rows = [self.line(at); PANEL_ROWS];
            let mut height = PANEL_ROWS;
            if at.i[2] + PANEL_ROWS <= width {
                rows = [0, 1, 2, 3].map(|lane| rows[lane] + lane * self.next[2]);
                at.i[2] += PANEL_ROWS;
            } else {
                height = 1;
                at.i[2] += 1;
                while height < PANEL_ROWS {
                    if at.i[2] == width && self.dense {
                        at = self.next_row(at);
                    }
                    if at.i[2] == width || at.sample == image.batch {
                        break;
                    }
                    // Rows past the last one are that one again.
                    rows[height..].fill(self.line(at));
                    at.i[2] += 1;
                    height += 1;
                }
            }
            if at.i[2] == width {
                at = self.next_row(at);
            }
            fours.push(Four { pixel, height });
            let starts = rows.map(|row| first.wrapping_add(row * between));
            for (&tap, to) in taps.iter().zip(&mut to) {
                *to = starts.map(|start| start.wrapping_add(tap * between));
            }
            *general = any_general
                && taps.iter().any(|tap| {
                    // SAFETY: a row of pixels of the field, whose flag was set by the stage before.
                    rows.iter().any(|row| unsafe { lines.is_general((row + tap) / p2) })
                });
        }
    }
}

/// Whether the margin is in proportion to the images; else the definition serves as well.
pub(super) fn is_fit(margin: [[usize; 3]; 2], image: Image, product: Image) -> bool {
    const MOST: usize = 32;
    let pixels = product_of(image.pixels) + product_of(product.pixels);
    Shape::sample_pixels(margin, image).is_some_and(|padded| padded <= MOST.saturating_mul(pixels))
}
