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
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// What a branch does next with its tensor.
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

    /// What comes of x; None where that is not float32 as torch lays it out, or has other sizes.
    fn run<'py>(&self, py: Python<'py>, x: &Bound<'py, PyAny>, threads: usize) -> PyResult<Option<Bound<'py, PyAny>>> {
        match self {
            Self::Linear { matrix, bias, format, mode } => {
                let bias = bias.as_ref().map(|bias| bias.bind(py));
                let out = matrix.get().multiply(py, x, *format, *mode, bias, threads)?;
                Ok(out.map(|(out, _)| out))
            }
            Self::Attend { cache, heads } => attend(py, cache.get(), x, *heads, threads),
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
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let Some(view) = FloatView::plain(x)?.filter(FloatView::is_contiguous) else { return Ok(None) };
    let width = view.count() / 3;
    if view.shape() != [1, 1, 3 * width] || width == 0 || heads == 0 || !width.is_multiple_of(heads) {
        return Ok(None);
    }
    let shape = [1, 1, width];
    let out = x.call_method1(intern!(py, "new_empty"), PyTuple::new(py, shape)?)?;
    let Some(mut target) = FloatView::fresh(&out, &shape) else { return Ok(None) };
    let parts = view.as_slice().chunks_exact(width);
    let parts: Vec<_> = parts.flat_map(|part| FloatTensor::new(part, &[1, heads, 1, width / heads])).collect();
    let [q, k, v] = &parts[..] else { return Ok(None) };
    let scale = (1.0 / ((width / heads) as f64).sqrt()) as f32;
    cache.take(py, [q, k, v], scale, target.as_mut_slice(), threads)?;
    Ok(Some(out))
}

/// x + f(x), branch after branch; each ends with a product, whose tensor takes the sum.
#[pyclass(frozen, module = "hbfp._core")]
pub(crate) struct Residual {
    branches: Vec<Vec<Step>>,
}

#[pymethods]
impl Residual {
    #[new]
    fn new(branches: Vec<Vec<StepArguments<'_>>>) -> PyResult<Self> {
        let steps = |branch: Vec<_>| branch.into_iter().map(Step::new).collect::<PyResult<Vec<_>>>();
        let branches = branches.into_iter().map(steps).collect::<PyResult<Vec<_>>>()?;
        if !branches.iter().all(|branch| matches!(branch.last(), Some(Step::Linear { .. }))) {
            return Err(HBFPError::new_err("expected branches that end with a product; found another end"));
        }
        Ok(Self { branches })
    }

    /// What comes of x, a new tensor; None, and nothing done, where x is not as usual.
    fn __call__<'py>(
        &self,
        py: Python<'py>,
        x: Bound<'py, PyAny>,
        threads: usize,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let mut x = x;
        let mut attended = false;
        for branch in &self.branches {
            let Some(view) = FloatView::plain(&x)?.filter(FloatView::is_contiguous) else {
                return declined(attended);
            };
            let mut y = x.clone();
            for step in branch {
                let Some(next) = step.run(py, &y, threads)? else { return declined(attended) };
                attended |= matches!(step, Step::Attend { .. });
                y = next;
            }
            // The product that ends the branch has made its tensor just now.
            let Some(mut sum) = FloatView::fresh(&y, view.shape()) else { return declined(attended) };
            for (sum, x) in sum.as_mut_slice().iter_mut().zip(view.as_slice()) {
                *sum += x;
            }
            drop((view, sum));
            x = y;
        }
        Ok(Some(x))
    }
}

/// The caller takes another way, unless a cache holds the token already.
fn declined<T>(attended: bool) -> PyResult<Option<T>> {
    if attended {
        let text = "expected float32 tensors of the sizes that the layers have; found others behind an attention, whose \
                    cache holds the token now: begin the text anew, with new caches";
        return Err(HBFPError::new_err(text));
    }
    Ok(None)
}
