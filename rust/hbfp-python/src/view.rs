//! Views of numpy arrays and CPU torch tensors: the one place where memory of Python objects is looked at.
#![allow(unsafe_code, reason = "views of memory that Python objects own")]

use crate::error::{DTypeError, ShapeError};
use hbfp::shape::FloatTensor;
use numpy::{
    Element, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyReadwriteArrayDyn, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyDict, PyTuple};
use std::ffi::{c_int, c_void};
use std::ops::Range;

/// What is asked of torch, once it is in use.
struct Torch {
    tensor: Py<PyAny>,
    parameter: Py<PyAny>,
    float32: Py<PyAny>,
    uint8: Py<PyAny>,
    empty: Py<PyAny>,
    /// Keyword arguments that make `empty` give bytes on the CPU, whatever the defaults.
    byte_options: Py<PyDict>,
    describe: Option<Describe>,
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

/// Accept instances of torch.Tensor wherever arrays are taken.
#[pyfunction]
pub(crate) fn set_tensor_type(py: Python<'_>, cls: Bound<'_, PyAny>) -> PyResult<()> {
    if TORCH.get(py).is_none() {
        let torch = py.import("torch")?;
        let parameter = torch.getattr("nn")?.getattr("Parameter")?.unbind();
        let float32 = torch.getattr("float32")?.unbind();
        let uint8 = torch.getattr("uint8")?;
        let byte_options = PyDict::new(py);
        byte_options.set_item("dtype", &uint8)?;
        byte_options.set_item("device", "cpu")?;
        let describe = dlpack::describe(&cls);
        let _ = TORCH.set(
            py,
            Torch {
                tensor: cls.unbind(),
                parameter,
                float32,
                uint8: uint8.unbind(),
                empty: torch.getattr("empty")?.unbind(),
                byte_options: byte_options.unbind(),
                describe,
            },
        );
        crate::run::look_for_openmp();
    }
    Ok(())
}

fn is_tensor(x: &Bound<'_, PyAny>) -> PyResult<bool> {
    TORCH.get(x.py()).map_or(Ok(false), |torch| x.is_instance(torch.tensor.bind(x.py())))
}

/// What a view keeps alive, and borrowed, while it is used.
enum Owner<'py> {
    Read { _array: PyReadonlyArrayDyn<'py, f32> },
    Write { _array: PyReadwriteArrayDyn<'py, f32> },
    Tensor { _tensor: Bound<'py, PyAny> },
}

/// An f32 tensor of any strides, read in place.
pub(crate) struct FloatView<'py> {
    ptr: *mut f32,
    shape: Vec<usize>,
    /// In elements.
    strides: Vec<isize>,
    _owner: Owner<'py>,
}

impl<'py> FloatView<'py> {
    /// For reading.
    pub(crate) fn read(x: &Bound<'py, PyAny>, what: &str) -> PyResult<Self> {
        Self::new(x, what, false)
    }

    /// For writing: C-contiguous.
    pub(crate) fn write(x: &Bound<'py, PyAny>, what: &str) -> PyResult<Self> {
        let view = Self::new(x, what, true)?;
        view.expect_contiguous(what)?;
        Ok(view)
    }

    fn new(x: &Bound<'py, PyAny>, what: &str, write: bool) -> PyResult<Self> {
        if let Some(view) = Self::plain(x)? {
            return Ok(view);
        }
        if is_tensor(x)? {
            return Self::from_tensor(x, what);
        }
        let Ok(array) = x.cast::<PyArrayDyn<f32>>() else {
            let found = match x.cast::<PyUntypedArray>() {
                Ok(array) => format!("an array of {}", array.dtype()),
                Err(_) => format!("a {}", x.get_type().name()?),
            };
            let text = format!("{what}: expected a native float32 array or CPU tensor; found {found}");
            return Err(DTypeError::new_err(text));
        };
        let shape = array.shape().to_vec();
        let ptr = array.data();
        let bytes = array.strides();
        let count: usize = shape.iter().product();
        if count > 0 && (!ptr.is_aligned() || bytes.iter().any(|s| s % 4 != 0)) {
            return Err(misaligned(what));
        }
        let strides = bytes.iter().map(|s| s / 4).collect();
        let busy = |e: &dyn std::fmt::Display, need: &str| {
            ShapeError::new_err(format!("{what}: expected an array that can be {need}; found one that can't ({e})"))
        };
        let owner = if write {
            Owner::Write { _array: array.try_readwrite().map_err(|e| busy(&e, "written"))? }
        } else {
            Owner::Read { _array: array.try_readonly().map_err(|e| busy(&e, "read"))? }
        };
        Ok(Self { ptr, shape, strides, _owner: owner })
    }

    /// For reading: a torch.Tensor or Parameter itself, float32, dense and on the CPU, by one call of C in place of some
    /// ten of Python. None: the object is another, or there is something about it that has to be asked in Python.
    pub(crate) fn plain(x: &Bound<'py, PyAny>) -> PyResult<Option<Self>> {
        Ok(match Self::described(x) {
            // Its memory holds the wrong signs, and only Python tells.
            Some(_) if x.call_method0(intern!(x.py(), "is_neg"))?.is_truthy()? => None,
            found => found,
        })
    }

    /// For writing: a tensor that torch has just allocated, so C-contiguous and without a lazy negation.
    pub(crate) fn fresh(x: &Bound<'py, PyAny>, shape: &[usize]) -> Option<Self> {
        Self::described(x).filter(|view| view.shape == shape && view.is_contiguous())
    }

    /// A contiguous tensor of this shape, of the kind of `like`, and a view for writing: `reused`, which nobody else may be
    /// looking at, or a new one.
    pub(crate) fn output(
        like: &Bound<'py, PyAny>,
        shape: &[usize],
        reused: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Option<(Bound<'py, PyAny>, Self)>> {
        if let Some(out) = reused
            && let Some(view) = Self::fresh(&out, shape)
        {
            return Ok(Some((out, view)));
        }
        let py = like.py();
        let out = like.call_method1(intern!(py, "new_empty"), PyTuple::new(py, shape)?)?;
        Ok(Self::fresh(&out, shape).map(|view| (out, view)))
    }

    /// [`Self::plain`] of a tensor that is known to have no lazy negation.
    pub(crate) fn described(x: &Bound<'py, PyAny>) -> Option<Self> {
        let torch = TORCH.get(x.py())?;
        let (describe, class) = (torch.describe?, x.get_type_ptr().cast());
        if class != torch.tensor.as_ptr() && class != torch.parameter.as_ptr() {
            return None;
        }
        let (ptr, shape, strides) = dlpack::elements::<f32>(x, describe)?;
        // torch.frombuffer begins anywhere.
        ptr.is_aligned().then_some(())?;
        Some(Self { ptr, shape, strides, _owner: Owner::Tensor { _tensor: x.clone() } })
    }

    /// `self` with all dimensions but the last as one.
    pub(crate) fn flattened(mut self) -> Option<Self> {
        if !self.is_contiguous() {
            return None;
        }
        let columns = *self.shape.last()?;
        let rows = self.shape[..self.shape.len() - 1].iter().product();
        (self.shape, self.strides) = (vec![rows, columns], vec![columns as isize, 1]);
        Some(self)
    }

    /// A kernel [out, in, ..], or an image [N, C, ..], of `rank` spatial dimensions with three of them.
    pub(crate) fn three_pixel_dimensions(mut self, rank: usize) -> Option<Self> {
        if self.shape.len() != rank + 2 {
            return None;
        }
        for _ in rank..3 {
            self.shape.insert(2, 1);
            self.strides.insert(2, 0);
        }
        Some(self)
    }

    /// An image [N, C, ..] as [N, p0, p1, p2, C], if it lies in memory so.
    pub(crate) fn channels_last(self, rank: usize) -> Option<Self> {
        let mut image = self.three_pixel_dimensions(rank)?;
        image.shape[1..].rotate_left(1);
        image.strides[1..].rotate_left(1);
        Some(image).filter(Self::is_contiguous)
    }

    fn from_tensor(x: &Bound<'py, PyAny>, what: &str) -> PyResult<Self> {
        let py = x.py();
        let dtype = x.getattr("dtype")?;
        let float32 = TORCH.get(py).is_some_and(|torch| dtype.is(torch.float32.bind(py)));
        let cpu: bool = x.getattr("is_cpu")?.extract()?;
        if !float32 || !cpu || x.call_method0("is_neg")?.extract()? {
            let found = format!("{dtype} on {}", x.getattr("device")?);
            let text =
                format!("{what}: expected a strided float32 tensor on the CPU, without a lazy negation; found {found}");
            return Err(DTypeError::new_err(text));
        }
        let shape: Vec<usize> = x.getattr("shape")?.extract()?;
        let strides: Vec<isize> = x.call_method0("stride")?.extract()?;
        let ptr: usize = x.call_method0("data_ptr")?.extract()?;
        if ptr == 0 && shape.iter().product::<usize>() > 0 {
            return Err(DTypeError::new_err(format!("{what}: expected a tensor with memory; found one without")));
        }
        let ptr = std::ptr::with_exposed_provenance_mut::<f32>(ptr);
        if !ptr.is_aligned() {
            return Err(misaligned(what));
        }
        Ok(Self { ptr, shape, strides, _owner: Owner::Tensor { _tensor: x.clone() } })
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(crate) fn count(&self) -> usize {
        self.shape.iter().product()
    }

    pub(crate) fn is_contiguous(&self) -> bool {
        let mut expected = 1isize;
        for (&n, &s) in self.shape.iter().zip(&self.strides).rev() {
            if n > 1 && s != expected {
                return self.count() == 0;
            }
            expected *= n as isize;
        }
        true
    }

    pub(crate) fn expect_contiguous(&self, what: &str) -> PyResult<()> {
        if self.is_contiguous() {
            return Ok(());
        }
        let text = format!(
            "{what}: expected C-contiguous memory; found strides {:?} for shape {:?}",
            self.strides, self.shape
        );
        Err(ShapeError::new_err(text))
    }

    pub(crate) fn expect_shape(&self, shape: &[usize], what: &str) -> PyResult<()> {
        if self.shape == shape {
            return Ok(());
        }
        Err(ShapeError::new_err(format!("{what}: expected shape {shape:?}; found {:?}", self.shape)))
    }

    /// Addresses from the first to behind the last byte.
    pub(crate) fn extent(&self) -> Range<usize> {
        let start = self.ptr.addr();
        if self.count() == 0 {
            return start..start;
        }
        let (mut low, mut high) = (0isize, 0isize);
        for (&n, &s) in self.shape.iter().zip(&self.strides) {
            let end = (n as isize - 1) * s;
            if end < 0 { low += end } else { high += end }
        }
        start.wrapping_add_signed(4 * low)..start.wrapping_add_signed(4 * high + 4)
    }

    pub(crate) fn expect_apart(&self, other: Range<usize>, what: &str) -> PyResult<()> {
        let own = self.extent();
        if own.start < other.end && other.start < own.end {
            let text =
                format!("{what}: expected memory apart from the inputs'; found an overlap: write to a new array");
            return Err(ShapeError::new_err(text));
        }
        Ok(())
    }

    pub(crate) fn tensor(&self) -> FloatTensor<'_> {
        // SAFETY: numpy and torch vouch for shape and strides, and the owner keeps the memory alive. Another thread that
        // writes to it meanwhile spoils results as it would in numpy.
        unsafe { FloatTensor::from_raw(self.ptr, self.shape.clone(), self.strides.clone()) }
    }

    /// The elements of a C-contiguous view.
    pub(crate) fn as_slice(&self) -> &[f32] {
        debug_assert!(self.is_contiguous());
        if self.count() == 0 {
            return &[];
        }
        // SAFETY: contiguous, aligned and alive.
        unsafe { std::slice::from_raw_parts(self.ptr, self.count()) }
    }

    /// The elements of a view made by [`Self::write`].
    pub(crate) fn as_mut_slice(&mut self) -> &mut [f32] {
        if self.count() == 0 {
            return &mut [];
        }
        // SAFETY: contiguous, aligned, alive and writable; inputs were checked to lie apart.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.count()) }
    }

    pub(crate) fn as_mut_ptr(&self) -> *mut f32 {
        self.ptr
    }
}

fn misaligned(what: &str) -> PyErr {
    DTypeError::new_err(format!("{what}: expected elements aligned to 4 bytes; found others: copy the array first"))
}

// SAFETY: used inside one call, which holds the owner and hands the memory to its threads.
unsafe impl Send for FloatView<'_> {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for FloatView<'_> {}

/// A one-dimensional uint8 torch tensor.
pub(crate) struct BytesView<'py> {
    ptr: *mut u8,
    len: usize,
    tensor: Bound<'py, PyAny>,
}

impl<'py> BytesView<'py> {
    /// A new one.
    pub(crate) fn new(py: Python<'py>, len: usize) -> PyResult<Self> {
        let torch = TORCH.get(py).ok_or_else(|| DTypeError::new_err("expected torch in use; found it not imported"))?;
        let tensor = torch.empty.bind(py).call((len,), Some(torch.byte_options.bind(py)))?;
        Self::read(&tensor, "a new tensor")
    }

    /// For reading.
    pub(crate) fn read(x: &Bound<'py, PyAny>, what: &str) -> PyResult<Self> {
        let py = x.py();
        if let Some(view) = Self::plain(x) {
            return Ok(view);
        }
        let fits = is_tensor(x)?
            && TORCH.get(py).is_some_and(|torch| x.getattr("dtype").is_ok_and(|dtype| dtype.is(torch.uint8.bind(py))))
            && x.getattr(intern!(py, "is_cpu"))?.extract()?
            && x.call_method0(intern!(py, "is_contiguous"))?.extract()?;
        if !fits {
            let text =
                format!("{what}: expected a contiguous uint8 tensor on the CPU; found a {}", x.get_type().name()?);
            return Err(DTypeError::new_err(text));
        }
        let len: usize = x.call_method0(intern!(py, "numel"))?.extract()?;
        let ptr: usize = x.call_method0(intern!(py, "data_ptr"))?.extract()?;
        if ptr == 0 && len > 0 {
            return Err(DTypeError::new_err(format!("{what}: expected a tensor with memory; found one without")));
        }
        Ok(Self { ptr: std::ptr::with_exposed_provenance_mut(ptr), len, tensor: x.clone() })
    }

    /// One of torch's own, by one call of C in place of five of Python.
    fn plain(x: &Bound<'py, PyAny>) -> Option<Self> {
        let torch = TORCH.get(x.py())?;
        if x.get_type_ptr().cast() != torch.tensor.as_ptr() {
            return None;
        }
        let (ptr, shape, strides) = dlpack::elements::<u8>(x, torch.describe?)?;
        let (&[len], &[1]) = (&shape[..], &strides[..]) else { return None };
        Some(Self { ptr, len, tensor: x.clone() })
    }

    /// Addresses from the first to behind the last byte.
    pub(crate) fn extent(&self) -> Range<usize> {
        self.ptr.addr()..self.ptr.addr() + self.len
    }

    pub(crate) fn into_tensor(self) -> Bound<'py, PyAny> {
        self.tensor
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: contiguous and alive; see `FloatView::tensor` for other threads.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }

    /// The bytes of a view made by [`Self::new`].
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: contiguous, alive, and known to nobody else yet.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

/// A C-contiguous array of another element type.
pub(crate) fn contiguous<'a, 'py, T: Element>(
    array: &'a PyReadonlyArrayDyn<'py, T>,
    shape: Option<[usize; 2]>,
    what: &str,
) -> PyResult<&'a [T]> {
    if let Some(shape) = shape
        && array.shape() != shape
    {
        let text = format!("{what}: expected shape {shape:?}; found {:?}", array.shape());
        return Err(ShapeError::new_err(text));
    }
    let other = || ShapeError::new_err(format!("{what}: expected C-contiguous memory; found another layout"));
    // `as_slice` takes Fortran order too.
    if !array.is_c_contiguous() {
        return Err(other());
    }
    array.as_slice().map_err(|_| other())
}

use dlpack::Describe;

/// The part of DLPack 1.x's exchange interface that tells a tensor's memory without a Python call.
mod dlpack {
    use super::*;
    use pyo3::types::PyCapsuleMethods;

    const MAJOR: u32 = 1;
    const CPU: i32 = 1;

    /// Types of elements, as they are numbered here.
    pub(super) trait Numbered {
        const CODE: u8;
    }
    impl Numbered for f32 {
        const CODE: u8 = 2;
    }
    impl Numbered for u8 {
        const CODE: u8 = 1;
    }

    #[repr(C)]
    pub(super) struct Tensor {
        data: *mut c_void,
        device: [i32; 2],
        rank: i32,
        code: u8,
        bits: u8,
        lanes: u16,
        shape: *const i64,
        strides: *const i64,
        byte_offset: u64,
    }

    /// Fills in the tensor's description, which borrows from the object; -1 with an exception set where there is none.
    pub(super) type Describe = unsafe extern "C" fn(*mut c_void, *mut Tensor) -> c_int;

    #[repr(C)]
    struct Exchange {
        version: [u32; 2],
        older: *const c_void,
        /// Allocator, and managed tensors out of and into Python objects.
        _managed: [*const c_void; 3],
        describe: Option<Describe>,
        _stream: *const c_void,
    }

    /// How objects of the class are described, where it speaks this interface.
    pub(super) fn describe(class: &Bound<'_, PyAny>) -> Option<Describe> {
        let found = class.getattr("__dlpack_c_exchange_api__").ok()?;
        let exchange = found.cast::<PyCapsule>().ok()?.pointer_checked(Some(c"dlpack_exchange_api")).ok()?;
        // SAFETY: the capsule's name says what it points to, which lives as long as the process; the version comes
        // first in every version, and is looked at before the rest.
        unsafe {
            let exchange = exchange.cast::<Exchange>();
            if (*exchange.as_ptr()).version[0] == MAJOR { exchange.as_ref().describe } else { None }
        }
    }

    /// Address, shape and strides of a tensor of `T` on the CPU that has memory.
    pub(super) fn elements<T: Numbered>(
        x: &Bound<'_, PyAny>,
        describe: Describe,
    ) -> Option<(*mut T, Vec<usize>, Vec<isize>)> {
        let mut tensor = std::mem::MaybeUninit::<Tensor>::uninit();
        // SAFETY: the GIL is held, and the object is of the class that gave `describe`, or of torch's Parameter, which
        // is laid out alike.
        if unsafe { describe(x.as_ptr().cast(), tensor.as_mut_ptr()) } != 0 {
            // The caller asks in Python, and meets the error there.
            drop(PyErr::take(x.py()));
            return None;
        }
        // SAFETY: it was filled in.
        let tensor = unsafe { tensor.assume_init() };
        let bits = 8 * size_of::<T>() as u8;
        if (tensor.code, tensor.bits, tensor.lanes, tensor.device[0]) != (T::CODE, bits, 1, CPU)
            || tensor.data.is_null()
            || tensor.rank <= 0
            || tensor.strides.is_null()
        {
            return None;
        }
        let rank = tensor.rank as usize;
        // SAFETY: both arrays have `rank` elements and live as long as the object is not changed, which takes the GIL.
        let (shape, strides) = unsafe {
            (std::slice::from_raw_parts(tensor.shape, rank), std::slice::from_raw_parts(tensor.strides, rank))
        };
        let ptr = tensor.data.wrapping_byte_add(tensor.byte_offset as usize).cast();
        Some((ptr, shape.iter().map(|&n| n as usize).collect(), strides.iter().map(|&s| s as isize).collect()))
    }
}
