//! Running tasks on threads. Results never depend on how many there are or who runs which task.
#![allow(unsafe_code, reason = "the OpenMP runtime is a C library; the floating-point mode is a register")]

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Something that runs `body(worker)` for `worker` in `0..workers`, possibly at once, and returns when all are done.
///
/// An implementation may run fewer workers than asked for, as long as worker 0 runs: tasks are handed out dynamically.
pub trait Team: Sync {
    /// Runs the workers.
    fn run(&self, workers: usize, body: &(dyn Fn(usize) + Sync));
    /// Name for reports.
    fn name(&self) -> &'static str;
}

/// Tasks numbered from 0, run as `task(worker, index)`.
#[derive(Clone, Copy)]
pub(crate) struct Stage<'a> {
    pub(crate) tasks: usize,
    pub(crate) task: &'a (dyn Fn(usize, usize) + Sync),
}

/// Runs `task(worker, index)` for all indices below `tasks` on at most `workers` threads of `team`, in the default
/// floating-point mode. A panic of a task is passed on when all workers have stopped.
pub(crate) fn for_each_task(team: &dyn Team, workers: usize, tasks: usize, task: &(dyn Fn(usize, usize) + Sync)) {
    for_each_stage(team, workers, &[Stage { tasks, task }]);
}

/// Runs stages one after the other in a single region of the team: a stage begins when the one before has ended.
pub(crate) fn for_each_stage<const N: usize>(team: &dyn Team, workers: usize, stages: &[Stage<'_>; N]) {
    let most = stages.iter().map(|stage| stage.tasks).max().unwrap_or(0);
    let workers = workers.min(most);
    if workers <= 1 {
        let _mode = DefaultFloatMode::enter();
        for stage in stages {
            (0..stage.tasks).for_each(|i| (stage.task)(0, i));
        }
        return;
    }
    // Tasks handed out and tasks done, by stage.
    let next: [AtomicUsize; N] = std::array::from_fn(|_| AtomicUsize::new(0));
    let done: [AtomicUsize; N] = std::array::from_fn(|_| AtomicUsize::new(0));
    let stopped = AtomicBool::new(false);
    let panic: Mutex<Option<Box<dyn Any + Send>>> = Mutex::new(None);
    team.run(workers, &|worker| {
        let _mode = DefaultFloatMode::enter();
        let run = || {
            for (i, stage) in stages.iter().enumerate() {
                // Only tasks that some worker has begun are waited for, so a team of fewer workers ends as well.
                if i > 0 && !wait_for(&done[i - 1], stages[i - 1].tasks, &stopped) {
                    return;
                }
                loop {
                    let index = next[i].fetch_add(1, Ordering::Relaxed);
                    if index >= stage.tasks || stopped.load(Ordering::Relaxed) {
                        break;
                    }
                    (stage.task)(worker, index);
                    done[i].fetch_add(1, Ordering::Release);
                }
            }
        };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(run)) {
            stopped.store(true, Ordering::Relaxed);
            *panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(payload);
        }
    });
    let payload = panic.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(payload) = payload {
        resume_unwind(payload);
    }
}

/// Waits until `done` has reached `tasks`; false if a worker has stopped before.
fn wait_for(done: &AtomicUsize, tasks: usize, stopped: &AtomicBool) -> bool {
    let mut spins = 0u32;
    while done.load(Ordering::Acquire) < tasks {
        if stopped.load(Ordering::Relaxed) {
            return false;
        }
        spins += 1;
        // The tasks left over take microseconds, unless the scheduler took a worker's core away.
        if spins < 10_000 { std::hint::spin_loop() } else { std::thread::yield_now() }
    }
    true
}

/// The calling thread alone.
#[derive(Clone, Copy, Debug)]
pub struct Serial;

impl Team for Serial {
    fn run(&self, _workers: usize, body: &(dyn Fn(usize) + Sync)) {
        body(0);
    }
    fn name(&self) -> &'static str {
        "serial"
    }
}

/// Rounding to nearest even, subnormals kept, as long as it lives; then the caller's mode again.
pub(crate) struct DefaultFloatMode {
    saved: u64,
}

#[cfg(target_arch = "x86_64")]
impl DefaultFloatMode {
    const DEFAULT: u32 = 0x1F80;

    pub(crate) fn enter() -> Self {
        let mut saved = 0u32;
        // SAFETY: stores and loads MXCSR, whose default value is always valid.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut saved, options(nostack, preserves_flags));
            std::arch::asm!("ldmxcsr [{}]", in(reg) &Self::DEFAULT, options(nostack, preserves_flags));
        }
        Self { saved: u64::from(saved) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for DefaultFloatMode {
    fn drop(&mut self) {
        let saved = self.saved as u32;
        // SAFETY: restores a value that was read from the register.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const saved, options(nostack, preserves_flags)) }
    }
}

#[cfg(target_arch = "aarch64")]
impl DefaultFloatMode {
    pub(crate) fn enter() -> Self {
        let saved: u64;
        // SAFETY: reads and clears FPCR: nearest even, no flushing.
        unsafe {
            std::arch::asm!("mrs {}, fpcr", out(reg) saved, options(nomem, nostack));
            std::arch::asm!("msr fpcr, {}", in(reg) 0u64, options(nomem, nostack));
        }
        Self { saved }
    }
}

#[cfg(target_arch = "aarch64")]
impl Drop for DefaultFloatMode {
    fn drop(&mut self) {
        // SAFETY: restores a value that was read from the register.
        unsafe { std::arch::asm!("msr fpcr, {}", in(reg) self.saved, options(nomem, nostack)) }
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
impl DefaultFloatMode {
    pub(crate) fn enter() -> Self {
        Self { saved: 0 }
    }
}

/// Own threads, started on first use and parked between regions. After a fork a new pool must be made: the child has
/// none of the threads.
pub struct Pool {
    shared: Arc<PoolShared>,
    /// Held for the length of a region; a second caller runs its region alone.
    region: Mutex<usize>,
}

struct PoolShared {
    state: Mutex<PoolState>,
    work: Condvar,
    done: Condvar,
}

#[derive(Default)]
struct PoolState {
    generation: u64,
    /// Workers of this region, worker 0 being the caller.
    workers: usize,
    running: usize,
    body: Option<Body>,
}

/// A region's body, its lifetime erased: the region outlives every use, because `run` waits.
#[derive(Clone, Copy)]
struct Body(*const (dyn Fn(usize) + Sync));
// SAFETY: the pointee is Sync, and alive while a region runs.
unsafe impl Send for Body {}

impl Default for Pool {
    fn default() -> Self {
        Self::new()
    }
}

impl Pool {
    /// A pool without threads yet.
    #[must_use]
    pub fn new() -> Self {
        let shared = PoolShared { state: Mutex::default(), work: Condvar::new(), done: Condvar::new() };
        Self { shared: Arc::new(shared), region: Mutex::new(0) }
    }

    fn worker(shared: &PoolShared, index: usize) {
        let mut seen = 0;
        loop {
            let body = {
                let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
                loop {
                    if state.generation != seen {
                        seen = state.generation;
                        if index < state.workers {
                            break state.body;
                        }
                    }
                    state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            };
            if let Some(body) = body {
                // SAFETY: `run` waits for this worker before the body goes out of scope.
                unsafe { (*body.0)(index) };
            }
            let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.running -= 1;
            if state.running == 0 {
                shared.done.notify_one();
            }
        }
    }
}

impl Team for Pool {
    fn run(&self, workers: usize, body: &(dyn Fn(usize) + Sync)) {
        let Ok(mut started) = self.region.try_lock() else {
            return body(0);
        };
        while *started + 1 < workers {
            let (shared, index) = (Arc::clone(&self.shared), *started + 1);
            let name = format!("hbfp-{index}");
            if std::thread::Builder::new().name(name).spawn(move || Self::worker(&shared, index)).is_err() {
                break;
            }
            *started += 1;
        }
        let workers = workers.min(*started + 1);
        {
            let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.generation += 1;
            (state.workers, state.running) = (workers, workers - 1);
            // SAFETY: erases the lifetime; this function returns only when no worker uses the body any more.
            let body: *const (dyn Fn(usize) + Sync + 'static) =
                unsafe { std::mem::transmute(std::ptr::from_ref(body)) };
            state.body = Some(Body(body));
        }
        self.shared.work.notify_all();
        body(0);
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.running > 0 {
            state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.body = None;
    }
    fn name(&self) -> &'static str {
        "own"
    }
}

/// The OpenMP runtime that another library of this process has loaded: its threads are warm, and sharing them can't
/// oversubscribe the cores.
#[cfg(target_os = "linux")]
#[derive(Clone, Copy, Debug)]
pub struct OpenMp {
    parallel: GompParallel,
    thread_num: unsafe extern "C" fn() -> libc::c_int,
    in_parallel: unsafe extern "C" fn() -> libc::c_int,
}

#[cfg(target_os = "linux")]
type GompParallel = unsafe extern "C" fn(
    body: unsafe extern "C" fn(*mut libc::c_void),
    data: *mut libc::c_void,
    threads: libc::c_uint,
    flags: libc::c_uint,
);

#[cfg(target_os = "linux")]
impl OpenMp {
    /// Looks for a loaded libgomp, libomp or libiomp5.
    #[must_use]
    pub fn find() -> Option<Self> {
        use std::ffi::{CStr, CString, c_char, c_int, c_void};
        unsafe extern "C" fn visit(info: *mut libc::dl_phdr_info, _: usize, found: *mut c_void) -> c_int {
            // SAFETY: the loader passes a valid entry; `found` is the vector below.
            let (name, found) = unsafe { ((*info).dlpi_name, &mut *found.cast::<Vec<CString>>()) };
            if !name.is_null() {
                // SAFETY: a C string of the loader.
                let path = unsafe { CStr::from_ptr(name) };
                let file = path.to_bytes().rsplit(|&b| b == b'/').next().unwrap_or_default();
                if [&b"libgomp"[..], b"libomp", b"libiomp5"].iter().any(|stem| file.starts_with(stem)) {
                    found.push(path.to_owned());
                }
            }
            0
        }
        let mut found: Vec<CString> = Vec::new();
        // SAFETY: the callback matches, and the vector outlives the call.
        unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut found).cast()) };
        found.into_iter().find_map(|path| {
            // SAFETY: only takes a handle on a library that is loaded already; it is kept for the life of the process.
            unsafe {
                let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_LAZY);
                if handle.is_null() {
                    return None;
                }
                let symbol = |name: &CStr| {
                    let p = libc::dlsym(handle, name.as_ptr().cast::<c_char>());
                    (!p.is_null()).then_some(p)
                };
                let (parallel, thread_num) = (symbol(c"GOMP_parallel")?, symbol(c"omp_get_thread_num")?);
                let in_parallel = symbol(c"omp_in_parallel")?;
                Some(Self {
                    parallel: std::mem::transmute::<*mut c_void, GompParallel>(parallel),
                    thread_num: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(thread_num),
                    in_parallel: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(in_parallel),
                })
            }
        })
    }
}

#[cfg(target_os = "linux")]
impl Team for OpenMp {
    fn run(&self, workers: usize, body: &(dyn Fn(usize) + Sync)) {
        struct Region<'a> {
            body: &'a (dyn Fn(usize) + Sync),
            thread_num: unsafe extern "C" fn() -> libc::c_int,
        }
        unsafe extern "C" fn entry(data: *mut libc::c_void) {
            // SAFETY: `data` is the region below, alive until GOMP_parallel returns. The body catches panics.
            unsafe {
                let region = &*data.cast::<Region<'_>>();
                (region.body)((region.thread_num)() as usize);
            }
        }
        // SAFETY: plain query of the runtime.
        if unsafe { (self.in_parallel)() } != 0 {
            return body(0);
        }
        let mut region = Region { body, thread_num: self.thread_num };
        // SAFETY: the runtime calls `entry` on at most `workers` threads, the caller's among them, and waits for all.
        unsafe { (self.parallel)(entry, (&raw mut region).cast(), workers as libc::c_uint, 0) }
    }
    fn name(&self) -> &'static str {
        "openmp"
    }
}
