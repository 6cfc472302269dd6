//! The residual stream of a transformer, x + f(x) branch after branch, for a single token: so small a product takes less
//! time than Python takes to get from one layer to the next.

use crate::attention::GrownAttention;
use crate::encode::mode;
use crate::error::HBFPError;
use crate::format::Format;
use crate::product::KeptMatrix;
use crate::view::FloatView;
use hbfp::BlockFormat;
use hbfp::encode::RoundingMode;
use hbfp::shape::FloatTensor;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::cell::Cell;
use std::sync::Mutex;

/// What is next done with a tensor.
enum Step {
    /// Multiplies it by a kept matrix, and adds a bias.
    Linear { matrix: Py<KeptMatrix>, bias: Option<Py<PyAny>>, format: BlockFormat, mode: RoundingMode },
    /// Takes it for the queries, keys and values of a token, heads side by side in each.
    Attend { cache: Py<GrownAttention>, heads: usize },
    /// Calls a function with it, and with these arguments.
    Call { function: Py<PyAny>, arguments: Vec<Py<PyAny>> },
}

#[derive(FromPyObject)]
enum StepArguments<'py> {
    Linear(PyRef<'py, KeptMatrix>, Option<Py<PyAny>>, PyRef<'py, Format>, u8),
    Attend(PyRef<'py, GrownAttention>, usize),
    Call(Py<PyAny>, Vec<Py<PyAny>>),
}

impl Step {
    fn new(arguments: StepArguments<'_>) -> PyResult<Self> {
        Ok(match arguments {
            StepArguments::Linear(matrix, bias, format, rounding) => {
                Self::Linear { matrix: matrix.into(), bias, format: format.inner, mode: mode(rounding, 0, 0)? }
            }
            StepArguments::Attend(cache, heads) => Self::Attend { cache: cache.into(), heads },
            StepArguments::Call(function, arguments) => Self::Call { function, arguments },
        })
    }

    fn all(steps: Vec<StepArguments<'_>>) -> PyResult<Vec<Self>> {
        steps.into_iter().map(Self::new).collect()
    }

    /// What comes of x, in `reused` where that fits; None where x is not float32 as torch lays it out, or has other sizes.
    fn run<'py>(
        &self,
        py: Python<'py>,
        x: &Bound<'py, PyAny>,
        threads: usize,
        reused: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        match self {
            Self::Linear { matrix, bias, format, mode } => {
                let Some(view) = FloatView::plain(x)? else { return Ok(None) };
                let bias = match bias {
                    None => None,
                    Some(bias) => match FloatView::plain(bias.bind(py))?.filter(FloatView::is_contiguous) {
                        None => return Ok(None),
                        bias => bias,
                    },
                };
                matrix.get().multiply(py, x, view, *format, *mode, bias, threads, reused)
            }
            Self::Attend { cache, heads } => attend(py, cache.get(), x, *heads, threads, reused),
            Self::Call { function, arguments } => {
                let arguments = [x].into_iter().chain(arguments.iter().map(|argument| argument.bind(py)));
                Ok(Some(function.bind(py).call1(PyTuple::new(py, arguments.collect::<Vec<_>>())?)?))
            }
        }
    }
}

/// Attention of one token, whose x [1, 1, 3 · heads · E] holds the queries, then the keys, then the values.
fn attend<'py>(
    py: Python<'py>,
    cache: &GrownAttention,
    x: &Bound<'py, PyAny>,
    heads: usize,
    threads: usize,
    reused: Option<Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let Some(view) = FloatView::plain(x)?.filter(FloatView::is_contiguous) else { return Ok(None) };
    let width = view.count() / 3;
    if view.shape() != [1, 1, 3 * width] || width == 0 || heads == 0 || !width.is_multiple_of(heads) {
        return Ok(None);
    }
    let Some((out, mut target)) = FloatView::output(x, &[1, 1, width], reused)? else { return Ok(None) };
    let parts = view.as_slice().chunks_exact(width);
    let parts: Vec<_> = parts.flat_map(|part| FloatTensor::new(part, &[1, heads, 1, width / heads])).collect();
    let [q, k, v] = &parts[..] else { return Ok(None) };
    let scale = (1.0 / ((width / heads) as f64).sqrt()) as f32;
    cache.take(py, [q, k, v], scale, target.as_mut_slice(), threads)?;
    Ok(Some(out))
}

/// x + f(x), branch after branch, each of which ends with a product, whose tensor takes the sum; then the steps of an end.
#[pyclass(frozen, module = "hbfp._core")]
pub(crate) struct Residual {
    branches: Vec<Vec<Step>>,
    end: Vec<Step>,
    /// What all steps but the last wrote the last time, to be written to again: to allocate takes a quarter of a small
    /// product's time. Functions that are called keep no view of what they are given.
    kept: Mutex<Vec<Option<Py<PyAny>>>>,
}

#[pymethods]
impl Residual {
    #[new]
    fn new(branches: Vec<Vec<StepArguments<'_>>>, end: Vec<StepArguments<'_>>) -> PyResult<Self> {
        let branches = branches.into_iter().map(Step::all).collect::<PyResult<Vec<_>>>()?;
        let end = Step::all(end)?;
        let multiplies = |steps: &Vec<Step>| matches!(steps.last(), Some(Step::Linear { .. }));
        if !branches.iter().all(multiplies) || !(end.is_empty() || multiplies(&end)) {
            return Err(HBFPError::new_err("expected branches that end with a product; found another end"));
        }
        Ok(Self { branches, end, kept: Mutex::default() })
    }

    /// What comes of x, a new tensor; None, and nothing done, where x is not as usual.
    fn __call__<'py>(
        &self,
        py: Python<'py>,
        x: Bound<'py, PyAny>,
        threads: usize,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        // A call beside another one has tensors of its own.
        let mut kept = self.kept.try_lock().ok();
        let steps = self.branches.iter().chain([&self.end]).map(Vec::len).sum::<usize>();
        if let Some(kept) = &mut kept {
            kept.resize_with(steps, || None);
        }
        let (mut number, attended) = (0, Cell::new(false));
        let mut along = |branch: &[Step], mut x: Bound<'py, PyAny>| -> PyResult<Option<Bound<'py, PyAny>>> {
            for step in branch {
                // The last one's is the caller's.
                let slot = kept.as_mut().and_then(|kept| kept[..steps - 1].get_mut(number));
                number += 1;
                let reused = slot.as_ref().and_then(|slot| slot.as_ref()).map(|tensor| tensor.bind(py).clone());
                let Some(out) = step.run(py, &x, threads, reused)? else { return declined(&attended) };
                attended.set(attended.get() || matches!(step, Step::Attend { .. }));
                if let (Some(slot), false) = (slot, matches!(step, Step::Call { .. })) {
                    *slot = Some(out.clone().unbind());
                }
                x = out;
            }
            Ok(Some(x))
        };
        let mut x = x;
        for branch in &self.branches {
            let Some(before) = FloatView::plain(&x)?.filter(FloatView::is_contiguous) else {
                return declined(&attended);
            };
            let Some(y) = along(branch, x.clone())? else { return Ok(None) };
            let Some(mut sum) = FloatView::fresh(&y, before.shape()) else { return declined(&attended) };
            for (sum, before) in sum.as_mut_slice().iter_mut().zip(before.as_slice()) {
                *sum += before;
            }
            drop((before, sum));
            x = y;
        }
        along(&self.end, x)
    }
}

/// The caller takes another way, unless a cache holds the token already.
fn declined<T>(attended: &Cell<bool>) -> PyResult<Option<T>> {
    if attended.get() {
        let text = "expected float32 tensors of the sizes that the layers have; found others behind an attention, whose \
                    cache holds the token now: begin the text anew, with new caches";
        return Err(HBFPError::new_err(text));
    }
    Ok(None)
}
