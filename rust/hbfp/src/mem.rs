//! Aligned buffers, and shared writes to disjoint places by the tasks of a team.
#![allow(unsafe_code, reason = "allocation with an alignment, and writes by several threads to parts of one buffer")]

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::marker::PhantomData;
use std::ptr::NonNull;

const ALIGNMENT: usize = 64;

/// Bytes on a cache-line boundary whose contents are kept only until the next [`AlignedBytes::reserve`].
#[derive(Debug, Default)]
pub struct AlignedBytes {
    block: Option<(NonNull<u8>, usize)>,
}

// SAFETY: the buffer is owned, like a Vec<u8>.
unsafe impl Send for AlignedBytes {}
// SAFETY: shared references give no access to the bytes but through raw pointers.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    /// At least `len` bytes of unspecified contents.
    pub(crate) fn reserve(&mut self, len: usize) -> NonNull<u8> {
        match self.block {
            Some((p, capacity)) if capacity >= len => p,
            _ => {
                self.free();
                let layout = Self::layout(len.max(ALIGNMENT));
                // SAFETY: the size is not zero.
                let Some(p) = NonNull::new(unsafe { alloc(layout) }) else { handle_alloc_error(layout) };
                advise_huge(p.as_ptr(), layout.size());
                // SAFETY: just allocated with this size. Zeroed once, so that reading padding is never undefined.
                unsafe { p.as_ptr().write_bytes(0, layout.size()) };
                self.block = Some((p, layout.size()));
                p
            }
        }
    }

    /// Bytes held.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.block.map_or(0, |(_, n)| n)
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.block.map_or(std::ptr::null(), |(p, _)| p.as_ptr().cast_const())
    }

    fn layout(len: usize) -> Layout {
        // Buffers of megabytes begin where a large page can.
        let alignment = if len >= HUGE_PAGE / 2 { HUGE_PAGE } else { ALIGNMENT };
        Layout::from_size_align(len.next_multiple_of(alignment), alignment)
            .expect("a buffer of fewer than isize::MAX bytes")
    }

    fn free(&mut self) {
        if let Some((p, len)) = self.block.take() {
            // SAFETY: allocated by `reserve` with this layout.
            unsafe { dealloc(p.as_ptr(), Self::layout(len)) }
        }
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        self.free();
    }
}

/// Bytes of a large page on x86-64, and on most ARM64 systems.
const HUGE_PAGE: usize = 2 << 20;

/// Asks for large pages wherever one lies whole in the memory: a product walks over more small ones than the first-level
/// translation buffer holds, and weights that come from the last-level cache come 11 % faster.
pub(crate) fn advise_huge(p: *const u8, len: usize) {
    #[cfg(target_os = "linux")]
    {
        let from = p.addr().next_multiple_of(HUGE_PAGE);
        let to = (p.addr() + len) & !(HUGE_PAGE - 1);
        if from < to {
            // SAFETY: advice that leaves contents as they are; the kernel may ignore it.
            unsafe { libc::madvise(from as *mut _, to - from, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (p, len);
}

/// Asks for all pages of memory that is about to be written, which may be fresh: one by one, each costs a fault, about twice
/// the time that the page itself takes.
pub(crate) fn ask_for(p: *const u8, len: usize) {
    #[cfg(target_os = "linux")]
    if len >= WORTH_ASKING {
        // SAFETY: a plain query.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let from = p.addr() & !(page - 1);
        // SAFETY: contents stay as they are; kernels older than 5.14, and memory of other kinds, answer with an error.
        unsafe { libc::madvise(from as *mut _, p.addr() + len - from, libc::MADV_POPULATE_WRITE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (p, len);
}

/// Below, the call costs more than the faults.
#[cfg(target_os = "linux")]
const WORTH_ASKING: usize = 64 << 10;

/// A slice that several tasks write to, each to its own part.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<'a, T> {
    ptr: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `part`, whose caller vouches for disjointness.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len(), lifetime: PhantomData }
    }
    /// # Safety
    /// `ptr` is valid for reading and writing `len` elements for `'a`, and nothing else uses them meanwhile.
    pub(crate) unsafe fn from_raw(ptr: *mut T, len: usize) -> Self {
        Self { ptr, len, lifetime: PhantomData }
    }
    pub(crate) fn len(&self) -> usize {
        self.len
    }
    pub(crate) fn as_ptr(&self) -> *const T {
        self.ptr
    }
    /// Where `len` elements from `from` on lie: for a rectangle, whose gaps other tasks may be writing.
    ///
    /// # Panics
    /// If they are not inside the slice.
    pub(crate) fn pointer(&self, from: usize, len: usize) -> *mut T {
        assert!(from <= self.len && len <= self.len - from);
        self.ptr.wrapping_add(from)
    }
    /// Elements `from .. from + len`.
    ///
    /// # Safety
    /// No other part in use overlaps this one.
    ///
    /// # Panics
    /// If the part is not inside the slice.
    #[allow(clippy::mut_from_ref, reason = "parts are disjoint by the caller's word")]
    pub(crate) unsafe fn part(&self, from: usize, len: usize) -> &'a mut [T] {
        assert!(from <= self.len && len <= self.len - from);
        // SAFETY: inside the slice; disjoint by the caller's word.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(from), len) }
    }
}
