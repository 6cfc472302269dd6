//! Tensors in memory: any strides, and neighbours that give away who reads them.
#![allow(unsafe_code, reason = "strided views of raw memory, and pages without access")]

use hbfp::shape::FloatTensor;
use std::mem::MaybeUninit;

/// What lies around the elements of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// NaN between and before the elements: a value that takes part by mistake makes its block a NaN block.
    Poisoned,
    /// The elements alone; gaps are never written. For valgrind, which sees both ends and what depends on a gap.
    Bare,
    /// A page that can't be read starts right behind the last element: reading it ends the test with SIGSEGV.
    FencedAfter,
    /// The same, ending right before the first element.
    FencedBefore,
}

/// Where the elements of a tensor lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The last two dimensions change places in memory: columns are contiguous.
    pub turned: bool,
    /// Elements between the ends of contiguous lines.
    pub gap: usize,
    /// Distance of neighbours of the innermost dimension.
    pub step: usize,
    /// All strides are negative.
    pub backwards: bool,
    /// All rows of a matrix are its first: a stride of zero.
    pub repeated: bool,
    /// Elements before the first, so that it starts at any alignment (not for fenced storage).
    pub offset: usize,
}

impl Placement {
    pub const DENSE: Self = Self { turned: false, gap: 0, step: 1, backwards: false, repeated: false, offset: 0 };

    /// One of each kind, and some of their combinations.
    pub const ALL: [Self; 10] = [
        Self::DENSE,
        Self { offset: 1, ..Self::DENSE },
        Self { gap: 3, ..Self::DENSE },
        Self { turned: true, ..Self::DENSE },
        Self { turned: true, gap: 5, offset: 3, ..Self::DENSE },
        Self { backwards: true, ..Self::DENSE },
        Self { backwards: true, turned: true, gap: 1, offset: 7, ..Self::DENSE },
        Self { step: 2, offset: 5, ..Self::DENSE },
        Self { step: 3, gap: 2, turned: true, ..Self::DENSE },
        Self { repeated: true, ..Self::DENSE },
    ];

    fn strides(self, shape: &[usize]) -> Vec<isize> {
        let rank = shape.len();
        let mut order: Vec<usize> = (0..rank).collect();
        if self.turned && rank >= 2 {
            order.swap(rank - 2, rank - 1);
        }
        let mut strides = vec![0; rank];
        let mut stride = self.step;
        for (i, &d) in order.iter().rev().enumerate() {
            strides[d] = if self.backwards { -(stride as isize) } else { stride as isize };
            stride = stride * shape[d] + if i == 0 { self.gap } else { 0 };
        }
        if self.repeated && rank >= 2 {
            strides[rank - 2] = 0;
        }
        strides
    }
}

/// A tensor that owns its memory.
#[derive(Debug)]
pub struct Tensor {
    memory: Memory,
    /// Index in memory of the tensor's first element.
    first: usize,
    shape: Vec<usize>,
    strides: Vec<isize>,
}

#[derive(Debug)]
enum Memory {
    Heap(Box<[MaybeUninit<f32>]>),
    #[cfg(unix)]
    Pages(fenced::Pages),
}

impl Memory {
    fn new(len: usize, storage: Storage) -> Self {
        match storage {
            Storage::Poisoned => Self::Heap(vec![MaybeUninit::new(f32::NAN); len].into_boxed_slice()),
            #[cfg(unix)]
            Storage::FencedAfter | Storage::FencedBefore => {
                Self::Pages(fenced::Pages::new(len, storage == Storage::FencedAfter))
            }
            _ => Self::Heap(Box::new_uninit_slice(len)),
        }
    }
    fn elements(&mut self) -> &mut [MaybeUninit<f32>] {
        match self {
            Self::Heap(memory) => memory,
            #[cfg(unix)]
            Self::Pages(pages) => pages.elements(),
        }
    }
    fn as_ptr(&self) -> *const f32 {
        match self {
            Self::Heap(memory) => memory.as_ptr().cast(),
            #[cfg(unix)]
            Self::Pages(pages) => pages.as_ptr(),
        }
    }
}

impl Tensor {
    /// A tensor of row-major `values`, laid out by `placement`. Where elements share a place the last one stands there.
    pub fn new(values: &[f32], shape: &[usize], placement: Placement, storage: Storage) -> Self {
        let fenced = matches!(storage, Storage::FencedAfter | Storage::FencedBefore);
        let offset = if fenced { 0 } else { placement.offset };
        let strides = placement.strides(shape);
        let places = places(shape, &strides);
        assert_eq!(places.len(), values.len());
        let (low, high) = (places.iter().min().copied().unwrap_or(0), places.iter().max().map_or(-1, |&high| high));
        let mut memory = Memory::new(offset + (high - low + 1) as usize, storage);
        let first = offset as isize - low;
        for (&place, &x) in places.iter().zip(values) {
            memory.elements()[(first + place) as usize].write(x);
        }
        Self { memory, first: first as usize, shape: shape.to_vec(), strides }
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn view(&self) -> FloatTensor<'_> {
        self.cut(0, self.shape[0])
    }

    /// The view of the first `len` indices of dimension `dim`.
    pub fn cut(&self, dim: usize, len: usize) -> FloatTensor<'_> {
        assert!(len <= self.shape[dim]);
        let mut shape = self.shape.clone();
        shape[dim] = len;
        // SAFETY: `new` wrote every element of the larger shape.
        unsafe { FloatTensor::from_raw(self.memory.as_ptr().wrapping_add(self.first), shape, self.strides.clone()) }
    }

    /// The view of `shape`: dimensions of length 1 are repeated as often as it says.
    pub fn expand(&self, shape: &[usize]) -> FloatTensor<'_> {
        let strides = self.expanded_strides(shape);
        // SAFETY: repeated indices share the elements that `new` wrote.
        unsafe { FloatTensor::from_raw(self.memory.as_ptr().wrapping_add(self.first), shape.to_vec(), strides) }
    }

    fn expanded_strides(&self, shape: &[usize]) -> Vec<isize> {
        assert!(
            shape.len() == self.shape.len() && shape.iter().zip(&self.shape).all(|(&n, &own)| own == n || own == 1)
        );
        shape.iter().zip(&self.shape).zip(&self.strides).map(|((&n, &own), &s)| if own == n { s } else { 0 }).collect()
    }

    /// The elements of that view, row-major.
    pub fn expanded_values(&self, shape: &[usize]) -> Vec<f32> {
        let at = |place: isize| (self.first as isize + place) as usize;
        places(shape, &self.expanded_strides(shape))
            .into_iter()
            // SAFETY: `new` wrote every element.
            .map(|place| unsafe { *self.memory.as_ptr().add(at(place)) })
            .collect()
    }

    /// The elements, row-major.
    pub fn values(&self) -> Vec<f32> {
        self.expanded_values(&self.shape)
    }
}

/// Places of all elements, row-major, counted from the first.
fn places(shape: &[usize], strides: &[isize]) -> Vec<isize> {
    shape.iter().zip(strides).fold(vec![0], |outer: Vec<isize>, (&len, &stride)| {
        outer.iter().flat_map(|&place| (0..len as isize).map(move |i| place + i * stride)).collect()
    })
}

#[cfg(unix)]
mod fenced {
    use std::mem::MaybeUninit;
    use std::ptr::NonNull;

    /// Elements with a page that can't be read or written on either side, one of them directly at their end or start.
    #[derive(Debug)]
    pub struct Pages {
        pages: NonNull<u8>,
        bytes: usize,
        from: usize,
        len: usize,
    }

    impl Pages {
        pub fn new(len: usize, at_the_end: bool) -> Self {
            // SAFETY: plain query.
            let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
            let inside = (4 * len).next_multiple_of(page);
            let bytes = inside + 2 * page;
            // SAFETY: fresh pages at an address of the system's choice, of which the inner ones become accessible.
            let pages = unsafe {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANON;
                let pages = libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0);
                assert_ne!(pages, libc::MAP_FAILED);
                let inner = pages.cast::<u8>().add(page);
                assert_eq!(0, libc::mprotect(inner.cast(), inside, libc::PROT_READ | libc::PROT_WRITE));
                NonNull::new(pages.cast()).unwrap()
            };
            Self { pages, bytes, from: page + if at_the_end { inside - 4 * len } else { 0 }, len }
        }
        pub fn as_ptr(&self) -> *const f32 {
            self.pages.as_ptr().wrapping_add(self.from).cast::<f32>().cast_const()
        }
        pub fn elements(&mut self) -> &mut [MaybeUninit<f32>] {
            // SAFETY: `len` elements inside the accessible pages, which belong to self.
            unsafe { std::slice::from_raw_parts_mut(self.as_ptr().cast_mut().cast(), self.len) }
        }
    }

    impl Drop for Pages {
        fn drop(&mut self) {
            // SAFETY: mapped by `new`.
            unsafe { libc::munmap(self.pages.as_ptr().cast(), self.bytes) };
        }
    }
}
