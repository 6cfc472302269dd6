//! Views of tensors: where the lines of blocks lie in memory, which random bits belong to them, how large the planes are.
#![allow(unsafe_code, reason = "strided views of memory that belongs to the caller")]

use crate::error::{Error, Result};
use crate::format::{BlockFormat, BlockShape};
use crate::pack::packed_bytes;
use std::marker::PhantomData;
use std::ops::Range;

/// A strided view of an f32 tensor of any rank. Strides count elements and may be zero or negative.
#[derive(Clone, Debug)]
pub struct FloatTensor<'a> {
    ptr: *const f32,
    shape: Vec<usize>,
    strides: Vec<isize>,
    lifetime: PhantomData<&'a [f32]>,
}

// SAFETY: only reads, like &[f32].
unsafe impl Send for FloatTensor<'_> {}
// SAFETY: as above.
unsafe impl Sync for FloatTensor<'_> {}

impl<'a> FloatTensor<'a> {
    /// A row-major tensor.
    ///
    /// # Errors
    /// [`Error::Shape`] when the shape does not have `data.len()` elements.
    pub fn new(data: &'a [f32], shape: &[usize]) -> Result<Self> {
        if element_count(shape)? != data.len() {
            return Err(Error::shape(format!("{} elements for shape {shape:?}", data.len()), "another count"));
        }
        let mut strides = vec![1isize; shape.len()];
        for d in (1..shape.len()).rev() {
            strides[d - 1] = strides[d] * shape[d] as isize;
        }
        Ok(Self { ptr: data.as_ptr(), shape: shape.to_vec(), strides, lifetime: PhantomData })
    }

    /// # Safety
    /// Every element `ptr + Σ index · stride` inside `shape` is valid for reading for `'a`.
    #[must_use]
    pub unsafe fn from_raw(ptr: *const f32, shape: Vec<usize>, strides: Vec<isize>) -> Self {
        debug_assert_eq!(shape.len(), strides.len());
        Self { ptr, shape, strides, lifetime: PhantomData }
    }

    /// Lengths of the dimensions.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The element at an index; valid for reading when that is inside the shape.
    pub(crate) fn at(&self, index: &[usize]) -> *const f32 {
        let offset = index.iter().zip(&self.strides).map(|(&i, &s)| i as isize * s).sum();
        self.ptr.wrapping_offset(offset)
    }

    /// The lines along `axis` of the tensor, grouped in matrices; see [`FloatLines`].
    ///
    /// # Errors
    /// [`Error::Shape`] when more than 2^32 rows would need random bits.
    pub(crate) fn lines(&self, axis: usize) -> Result<FloatLines<'a>> {
        let (mut shape, mut strides, mut axis) = (self.shape.clone(), self.strides.clone(), axis);
        // A 0-d or 1-D tensor is one row.
        while shape.len() < 2 {
            axis = if shape.is_empty() { 0 } else { 1 };
            let stride = strides.first().map_or(1, |_| 0);
            shape.insert(0, 1);
            strides.insert(0, stride);
        }
        let rank = shape.len();
        let last = rank - 1;
        let rows = element_count(&shape[..last])?;
        if rows as u64 > 1 << 32 {
            return Err(Error::shape(
                "at most 2^32 rows (the product of all dimensions but the last)",
                rows.to_string(),
            ));
        }
        let by_line = axis == last;
        let (line_dim, batch_dims): (usize, Vec<usize>) = if by_line {
            (rank - 2, (0..rank - 2).collect())
        } else {
            (last, (0..last).filter(|&d| d != axis).collect())
        };
        // All leading indices, the last of them fastest: the order of rows in the planes.
        let count: usize = batch_dims.iter().map(|&d| shape[d]).product();
        let mut offsets = Vec::with_capacity(count);
        let mut index = vec![0usize; batch_dims.len()];
        for _ in 0..count {
            offsets.push(batch_dims.iter().zip(&index).map(|(&d, &i)| strides[d] * i as isize).sum());
            for (i, &d) in index.iter_mut().zip(&batch_dims).rev() {
                *i += 1;
                if *i < shape[d] {
                    break;
                }
                *i = 0;
            }
        }
        let row_step = if by_line { 1 } else { shape[axis + 1..last].iter().product::<usize>() };
        Ok(FloatLines {
            ptr: self.ptr,
            offsets,
            lines: shape[line_dim],
            k: shape[axis],
            line_stride: strides[line_dim],
            k_stride: strides[axis],
            by_line,
            row_step,
            first_row: 0,
            plane: std::ptr::null(),
            image: None,
            lifetime: PhantomData,
        })
    }
}

/// Matrices of `lines` × `k` elements: each line is cut into blocks along k. Rows of random bits follow the tensor they
/// were taken from: a line is a row of it (`by_line`), or lies across its rows.
#[derive(Clone, Debug)]
pub(crate) struct FloatLines<'a> {
    ptr: *const f32,
    offsets: Vec<isize>,
    pub(crate) lines: usize,
    pub(crate) k: usize,
    pub(crate) line_stride: isize,
    pub(crate) k_stride: isize,
    pub(crate) by_line: bool,
    pub(crate) row_step: usize,
    /// Row of the random bits of the first element: not 0 where these are part of a larger tensor.
    first_row: usize,
    /// Random bits laid out as the elements are, in place of rows and columns; null: none.
    plane: *const u16,
    /// Whose pixels' channels the lines are, one pixel after the other, along the samples.
    pub(crate) image: Option<ImageRows>,
    lifetime: PhantomData<&'a [f32]>,
}

/// Where the random bits of an image's elements are: rows are (sample, channel, row of pixels), columns the pixels of that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ImageRows {
    pub(crate) channels: usize,
    /// Rows of pixels of a sample, and pixels of one of them.
    pub(crate) rows: usize,
    pub(crate) width: usize,
}

// SAFETY: only reads, like &[f32].
unsafe impl Send for FloatLines<'_> {}
// SAFETY: as above.
unsafe impl Sync for FloatLines<'_> {}

impl<'a> FloatLines<'a> {
    /// One matrix in memory of its own, which holds the rows from `first_row` on of a tensor that is nowhere whole.
    ///
    /// # Safety
    /// `rows` rows of `columns` elements, `stride` elements apart, are valid for reading from `ptr` on for `'a`.
    pub(crate) unsafe fn of_rows(
        ptr: *const f32,
        [rows, columns]: [usize; 2],
        stride: usize,
        by_line: bool,
        first_row: usize,
    ) -> Self {
        let (lines, k) = if by_line { (rows, columns) } else { (columns, rows) };
        let (line_stride, k_stride) = if by_line { (stride as isize, 1) } else { (1, stride as isize) };
        let (offsets, lifetime) = (vec![0], PhantomData);
        let (plane, image) = (std::ptr::null(), None);
        Self { ptr, offsets, lines, k, line_stride, k_stride, by_line, row_step: 1, first_row, plane, image, lifetime }
    }

    /// One matrix in memory of its own, transposed: it holds the rows from `first_row` on of a tensor that is nowhere whole,
    /// side by side, and they are its lines.
    ///
    /// # Safety
    /// `lines` neighbours are valid for reading from each of `k` elements on, `lines` apart, from `ptr` on for `'a`.
    pub(crate) unsafe fn of_columns(ptr: *const f32, [lines, k]: [usize; 2], first_row: usize) -> Self {
        let (line_stride, k_stride) = (1, lines as isize);
        // SAFETY: the caller's word.
        let rows = unsafe { Self::of_rows(ptr, [lines, k], 0, true, first_row) };
        Self { line_stride, k_stride, ..rows }
    }

    /// Rows of one matrix: some of its lines, or, where lines lie across the rows, a part of each. Random bits stay
    /// with the elements.
    pub(crate) fn rows(&self, m: usize, rows: Range<usize>) -> FloatLines<'a> {
        debug_assert!(self.by_line || self.row_step == 1, "rows of the last two dimensions");
        let (line, k) = if self.by_line { (rows.start, 0) } else { (0, rows.start) };
        let (lines, depth) = if self.by_line { (rows.len(), self.k) } else { (self.lines, rows.len()) };
        FloatLines {
            offsets: vec![self.offsets[m] + line as isize * self.line_stride + k as isize * self.k_stride],
            lines,
            k: depth,
            first_row: self.row(m, line, k),
            ..*self
        }
    }

    /// Some of the matrices. Random bits stay with the elements.
    pub(crate) fn matrices_of(&self, run: Range<usize>) -> FloatLines<'a> {
        debug_assert!(self.row_step == 1, "matrices of the last two dimensions");
        FloatLines { first_row: self.row(run.start, 0, 0), offsets: self.offsets[run].to_vec(), ..*self }
    }

    /// Matrices that begin `offsets` elements from `ptr` on, whose random bits lie in a plane as they themselves do.
    ///
    /// # Safety
    /// Every element is valid for reading for `'a`, and so are as many u16 of the plane, at the same offsets, unless it
    /// is null; along k it can be read [`crate::arch::generic::encode::ROW_PADDING`] elements further.
    pub(crate) unsafe fn with_plane(
        ptr: *const f32,
        plane: *const u16,
        offsets: Vec<isize>,
        [lines, k]: [usize; 2],
        [line_stride, k_stride]: [isize; 2],
    ) -> Self {
        let lifetime = PhantomData;
        let (by_line, row_step, first_row, image) = (true, 1, 0, None);
        Self { ptr, offsets, lines, k, line_stride, k_stride, by_line, row_step, first_row, plane, image, lifetime }
    }

    pub(crate) fn has_plane(&self) -> bool {
        !self.plane.is_null()
    }

    /// Random bits of element `k` of `line` of matrix `m`, where they lie in a plane.
    pub(crate) fn plane_at(&self, m: usize, line: usize, k: usize) -> Option<*const u16> {
        let offset = self.offsets[m] + line as isize * self.line_stride + k as isize * self.k_stride;
        self.has_plane().then(|| self.plane.wrapping_offset(offset))
    }

    /// Matrices whose lines follow one another at a constant distance become one.
    pub(crate) fn merge(&mut self) {
        let step = self.line_stride * self.lines as isize;
        if self.by_line && self.offsets.len() > 1 && self.offsets.windows(2).all(|w| w[1] - w[0] == step) {
            self.lines *= self.offsets.len();
            self.offsets.truncate(1);
        }
    }

    pub(crate) fn matrices(&self) -> usize {
        self.offsets.len()
    }

    /// Element `k` of `line` of matrix `m`; valid for reading when all three are in range.
    pub(crate) fn at(&self, m: usize, line: usize, k: usize) -> *const f32 {
        self.ptr.wrapping_offset(self.offsets[m] + line as isize * self.line_stride + k as isize * self.k_stride)
    }

    /// Row of the random bits of element `k` of `line` of matrix `m`.
    pub(crate) fn random_row(&self, m: usize, line: usize, k: usize) -> u32 {
        self.row(m, line, k) as u32
    }

    fn row(&self, m: usize, line: usize, k: usize) -> usize {
        self.first_row
            + if self.by_line {
                m * self.lines + line
            } else {
                m / self.row_step * self.k * self.row_step + m % self.row_step + k * self.row_step
            }
    }
}

pub(crate) fn element_count(shape: &[usize]) -> Result<usize> {
    // Zeros aside, so that parts of the product can be taken without care.
    let count = shape
        .iter()
        .filter(|&&d| d != 0)
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .filter(|&n| n <= isize::MAX as usize / 4)
        .ok_or_else(|| Error::shape("a shape whose elements can be counted", format!("{shape:?}")))?;
    Ok(if shape.contains(&0) { 0 } else { count })
}

/// How a tensor of a shape lies in its two planes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaneLayout {
    pub(crate) format: BlockFormat,
    pub(crate) shape: Vec<usize>,
    pub(crate) axis: usize,
    /// Product of the dimensions before and after the blocked axis (lines), or matrices and 1 (tiles).
    pub(crate) outer: usize,
    pub(crate) inner: usize,
    /// Length of the blocked axis.
    pub(crate) k: usize,
    /// Rows and columns of the last two dimensions (tiles).
    pub(crate) matrix: [usize; 2],
    exponents: [usize; 2],
    mantissas: [usize; 2],
}

impl PlaneLayout {
    /// The layout of a tensor of `shape` blocked along `axis`, which plays no part for tiles and whole tensors.
    ///
    /// # Errors
    /// [`Error::Shape`] for an axis outside the shape and sizes that overflow.
    pub fn new(format: BlockFormat, shape: &[usize], axis: usize) -> Result<Self> {
        let count = element_count(shape)?;
        if axis >= shape.len().max(1) {
            return Err(Error::shape(format!("an axis below {}", shape.len()), axis.to_string()));
        }
        // A 0-d tensor is one row of one element.
        let padded: &[usize] = if shape.is_empty() { &[1] } else { shape };
        let last = padded.len() - 1;
        let matrix = [if last > 0 { padded[last - 1] } else { 1 }, padded[last]];
        let bytes = |n: usize| packed_bytes(n, format.bits());
        let (outer, inner, k, exponents, mantissas);
        match format.shape() {
            BlockShape::Line(n) => {
                outer = padded[..axis].iter().product::<usize>();
                inner = padded[axis + 1..].iter().product::<usize>();
                k = padded[axis];
                let row = k / n * bytes(n) + bytes(k % n);
                (exponents, mantissas) = ([outer * inner, k.div_ceil(n)], [outer * inner, row]);
            }
            BlockShape::Tile(t) => {
                outer = padded[..last.saturating_sub(1)].iter().product::<usize>();
                (inner, k) = (1, matrix[1]);
                let (rows, columns) = (outer * matrix[0].div_ceil(t), matrix[1].div_ceil(t));
                // An overflow is found below: saturated, it is too large.
                (exponents, mantissas) = ([rows, columns], [rows, columns.saturating_mul(bytes(t * t))]);
            }
            BlockShape::Tensor => {
                (outer, inner, k) = (1, 1, count);
                (exponents, mantissas) = ([1, usize::from(count > 0)], [1, bytes(count)]);
            }
        }
        if element_count(&exponents).is_err() || element_count(&mantissas).is_err() {
            return Err(Error::shape("planes that fit in memory", format!("shape {shape:?}")));
        }
        Ok(Self { format, shape: shape.to_vec(), axis, outer, inner, k, matrix, exponents, mantissas })
    }

    /// Shape of the exponent plane.
    #[must_use]
    pub fn exponents(&self) -> [usize; 2] {
        self.exponents
    }
    /// Shape of the mantissa plane, in bytes.
    #[must_use]
    pub fn mantissas(&self) -> [usize; 2] {
        self.mantissas
    }
    /// The blocked axis.
    #[must_use]
    pub fn axis(&self) -> usize {
        self.axis
    }
    /// Shape of the tensor.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// The format.
    #[must_use]
    pub fn format(&self) -> BlockFormat {
        self.format
    }
}
