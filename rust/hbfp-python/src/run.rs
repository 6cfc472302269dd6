//! The one door from Python to the core: chooses kernels and threads, releases the GIL, maps errors and panics.

use crate::error::{HBFPError, LevelError, to_python};
use hbfp::parallel::{Pool, Serial, Team};
use hbfp::{Context, Error, Kernels, Level};
use hbfp::{attention, gemm};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock};

/// More threads than this are never asked for.
const MAX_THREADS: usize = 256;
/// Workspaces kept between calls: as many as run at once.
const KEPT_WORKSPACES: usize = 4;

static KERNELS: OnceLock<Result<&'static Kernels, Error>> = OnceLock::new();
static PRODUCT_WORKSPACES: Kept<gemm::Workspace> = Kept::new();
static ATTENTION_WORKSPACES: Kept<attention::Workspace> = Kept::new();
static POOL: Mutex<Option<(u32, Arc<Pool>)>> = Mutex::new(None);
/// Process that loaded this module: an OpenMP runtime that has threads does not survive a fork.
static HOME: OnceLock<u32> = OnceLock::new();
#[cfg(target_os = "linux")]
static OPENMP: OnceLock<hbfp::parallel::OpenMp> = OnceLock::new();

#[derive(Clone, Copy, PartialEq, Eq)]
enum Threading {
    Auto,
    OpenMp,
    Own,
    Serial,
}
static THREADING: OnceLock<Result<Threading, String>> = OnceLock::new();

/// Called when the module is loaded: first use would be too late, it may come in a forked child.
pub(crate) fn remember_process() {
    let _ = HOME.set(std::process::id());
}

fn kernels() -> PyResult<&'static Kernels> {
    let kernels = KERNELS.get_or_init(|| match std::env::var("HBFP_LEVEL") {
        Ok(name) if !name.is_empty() => Level::request(&name).map(Kernels::of),
        _ => Ok(Kernels::best()),
    });
    kernels.clone().map_err(|e| LevelError::new_err(format!("HBFP_LEVEL: {e}")))
}

fn threading() -> PyResult<Threading> {
    let choice = THREADING.get_or_init(|| match std::env::var("HBFP_THREADING").as_deref() {
        Ok("openmp") => Ok(Threading::OpenMp),
        Ok("own") => Ok(Threading::Own),
        Ok("serial") => Ok(Threading::Serial),
        Ok("") | Err(_) => Ok(Threading::Auto),
        Ok(other) => Err(format!("HBFP_THREADING: expected openmp, own or serial; found {other:?}")),
    });
    choice.clone().map_err(LevelError::new_err)
}

/// Finds the OpenMP runtime of a library that was loaded since.
pub(crate) fn look_for_openmp() {
    #[cfg(target_os = "linux")]
    if OPENMP.get().is_none()
        && let Some(found) = hbfp::parallel::OpenMp::find()
    {
        let _ = OPENMP.set(found);
    }
}

fn own_pool() -> Option<Arc<Pool>> {
    // A lock that a fork caught in another thread's hands is never free in the child: work serially then.
    let mut slot = POOL.try_lock().ok()?;
    let process = std::process::id();
    if let Some((owner, pool)) = slot.take_if(|(owner, _)| *owner != process) {
        // The parent's threads do not exist here; its pool must not be used, and dropping it frees nothing of use.
        debug_assert_ne!(owner, process);
        std::mem::forget(pool);
    }
    Some(Arc::clone(&slot.get_or_insert_with(|| (process, Arc::new(Pool::new()))).1))
}

enum Chosen {
    #[cfg(target_os = "linux")]
    OpenMp(&'static hbfp::parallel::OpenMp),
    Pool(Arc<Pool>),
    Serial,
}

impl Chosen {
    fn team(&self) -> &dyn Team {
        match self {
            #[cfg(target_os = "linux")]
            Self::OpenMp(team) => *team,
            Self::Pool(team) => &**team,
            Self::Serial => &Serial,
        }
    }
}

fn choose(threads: usize) -> PyResult<Chosen> {
    let threading = threading()?;
    if threads <= 1 || threading == Threading::Serial {
        return Ok(Chosen::Serial);
    }
    #[cfg(target_os = "linux")]
    if threading != Threading::Own && HOME.get() == Some(&std::process::id()) {
        if let Some(openmp) = OPENMP.get() {
            return Ok(Chosen::OpenMp(openmp));
        }
        if threading == Threading::OpenMp {
            look_for_openmp();
            return OPENMP.get().map(Chosen::OpenMp).ok_or_else(|| {
                LevelError::new_err(
                    "HBFP_THREADING=openmp: expected a loaded OpenMP runtime; found none: import torch first",
                )
            });
        }
    }
    Ok(own_pool().map_or(Chosen::Serial, Chosen::Pool))
}

/// Runs `work` without the GIL on at most `threads` threads.
pub(crate) fn run<T: Send>(
    py: Python<'_>,
    threads: usize,
    work: impl FnOnce(&Context<'_>) -> Result<T, Error> + Send,
) -> PyResult<T> {
    let kernels = kernels()?;
    let threads = threads.clamp(1, MAX_THREADS);
    let chosen = choose(threads)?;
    py.detach(|| guarded(&Context { kernels, team: chosen.team(), threads }, work))
}

/// Runs `work`, a matter of microseconds, on this thread and with the GIL, whose release would take as long.
pub(crate) fn run_here<T>(work: impl FnOnce(&Context<'_>) -> Result<T, Error>) -> PyResult<T> {
    // A setting that nobody understands is an error at any size.
    threading()?;
    guarded(&here()?, work)
}

/// This thread alone, to ask what something will take.
pub(crate) fn here() -> PyResult<Context<'static>> {
    Ok(Context { kernels: kernels()?, team: &Serial, threads: 1 })
}

fn guarded<T>(ctx: &Context<'_>, work: impl FnOnce(&Context<'_>) -> Result<T, Error>) -> PyResult<T> {
    match catch_unwind(AssertUnwindSafe(|| work(ctx))) {
        Ok(result) => result.map_err(|e| to_python(&e)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            let text = text.unwrap_or("no message");
            Err(HBFPError::new_err(format!("internal error, please report it: {text}")))
        }
    }
}

/// Workspaces of a kind that are not in use.
struct Kept<W>(Mutex<Vec<W>>);

impl<W: Default> Kept<W> {
    const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// `work` with one of them, or a new one. A lock that is held elsewhere is not waited for.
    fn lend<T>(&self, work: impl FnOnce(&mut W) -> T) -> T {
        let mut workspace = self.0.try_lock().ok().and_then(|mut kept| kept.pop()).unwrap_or_default();
        let result = work(&mut workspace);
        if let Ok(mut kept) = self.0.try_lock()
            && kept.len() < KEPT_WORKSPACES
        {
            kept.push(workspace);
        }
        result
    }

    fn bytes(&self, bytes: impl Fn(&W) -> usize) -> usize {
        self.0.try_lock().map_or(0, |kept| kept.iter().map(bytes).sum())
    }
}

/// `work` with buffers for a product.
pub(crate) fn with_workspace<T>(
    ctx: &Context<'_>,
    work: impl FnOnce(&Context<'_>, &mut gemm::Workspace) -> Result<T, Error>,
) -> Result<T, Error> {
    PRODUCT_WORKSPACES.lend(|workspace| work(ctx, workspace))
}

/// The same as [`run`] with buffers for a product.
pub(crate) fn run_with_workspace<T: Send>(
    py: Python<'_>,
    threads: usize,
    work: impl FnOnce(&Context<'_>, &mut gemm::Workspace) -> Result<T, Error> + Send,
) -> PyResult<T> {
    run(py, threads, |ctx| with_workspace(ctx, work))
}

/// `work` with buffers for attention.
pub(crate) fn with_attention_workspace<T>(
    ctx: &Context<'_>,
    work: impl FnOnce(&Context<'_>, &mut attention::Workspace) -> Result<T, Error>,
) -> Result<T, Error> {
    ATTENTION_WORKSPACES.lend(|workspace| work(ctx, workspace))
}

/// The same as [`run`] with buffers for attention.
pub(crate) fn run_attention<T: Send>(
    py: Python<'_>,
    threads: usize,
    work: impl FnOnce(&Context<'_>, &mut attention::Workspace) -> Result<T, Error> + Send,
) -> PyResult<T> {
    run(py, threads, |ctx| with_attention_workspace(ctx, work))
}

/// Level, levels, CPU features, threading and build.
#[pyfunction]
pub(crate) fn info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("level", kernels()?.level().name())?;
    let levels = PyDict::new(py);
    for level in Level::ALL {
        let state = if level.is_available() { "available" } else { "not available: the CPU lacks its instructions" };
        levels.set_item(level.name(), state)?;
    }
    out.set_item("levels", levels)?;
    out.set_item("threading", choose(2)?.team().name())?;
    out.set_item("version", env!("CARGO_PKG_VERSION"))?;
    out.set_item("target", format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS))?;
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    out.set_item("build", build)?;
    let bytes =
        PRODUCT_WORKSPACES.bytes(gemm::Workspace::bytes) + ATTENTION_WORKSPACES.bytes(attention::Workspace::bytes);
    out.set_item("workspace_bytes", bytes)?;
    Ok(out)
}
