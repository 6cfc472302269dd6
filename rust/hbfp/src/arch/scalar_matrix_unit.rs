//! A matrix unit in plain arrays: the model on which the kernels for one are tested on machines that have none.

use super::generic::aligned::SixteenLanes;
use super::generic::matrix_unit::MatrixUnit;
use super::scalar::Scalar;
use std::cell::RefCell;

/// Eight registers of 16 rows of 64 bytes, and the steps that they are configured for; 0: not configured.
struct Unit {
    registers: [[[u8; 64]; 16]; 8],
    steps: usize,
}

thread_local! {
    static UNIT: RefCell<Unit> = const { RefCell::new(Unit { registers: [[[0; 64]; 16]; 8], steps: 0 }) };
}

fn with<R>(act: impl FnOnce(&mut Unit) -> R) -> R {
    UNIT.with_borrow_mut(|unit| {
        assert!(unit.steps > 0, "a matrix unit that is not configured");
        act(unit)
    })
}

// SAFETY of the blocks below: the callers vouch for what pointers reach.
impl SixteenLanes for Scalar<16> {
    unsafe fn steps_of_lines(self, lines: [*const u8; 4]) -> Self::V {
        // SAFETY: see above.
        let lines = lines.map(|line| unsafe { line.cast::<[u32; 4]>().read_unaligned() });
        std::array::from_fn(|lane| lines[lane % 4][lane / 4])
    }
}

impl MatrixUnit for Scalar<16> {
    type Before = usize;

    unsafe fn configure(self, steps: usize) -> usize {
        UNIT.with_borrow_mut(|unit| {
            unit.registers = [[[0; 64]; 16]; 8];
            std::mem::replace(&mut unit.steps, steps)
        })
    }
    unsafe fn restore(self, before: usize) {
        UNIT.with_borrow_mut(|unit| unit.steps = before);
    }
    unsafe fn store_sums<const T: usize>(self, to: *mut i32) {
        // SAFETY: see above.
        with(|unit| unsafe { to.cast::<[[u8; 64]; 16]>().write_unaligned(unit.registers[T]) });
    }
    unsafe fn clear<const T: usize>(self) {
        with(|unit| unit.registers[T] = [[0; 64]; 16]);
    }
    unsafe fn fill<const T: usize>(self, from: *const u8, stride: usize) {
        with(|unit| {
            // Left codes: 16 rows of whole steps. Right codes: a row a step.
            let (rows, bytes) = if T < 6 { (16, 4 * unit.steps) } else { (unit.steps, 64) };
            for (i, row) in unit.registers[T].iter_mut().take(rows).enumerate() {
                // SAFETY: see above.
                unsafe { row.as_mut_ptr().copy_from_nonoverlapping(from.add(i * stride), bytes) };
            }
        });
    }
    unsafe fn fill_passing<const T: usize>(self, from: *const u8, stride: usize) {
        // SAFETY: see above.
        unsafe { self.fill::<T>(from, stride) };
    }
    unsafe fn multiply<const SUMS: usize, const LEFT: usize, const RIGHT: usize>(self) {
        with(|unit| {
            let (left, right, steps) = (unit.registers[LEFT], unit.registers[RIGHT], unit.steps);
            for (sums, left) in unit.registers[SUMS].iter_mut().zip(&left) {
                for (column, sum) in sums.chunks_exact_mut(4).enumerate() {
                    let products = (0..4 * steps)
                        .map(|k| i32::from(left[k] as i8) * i32::from(right[k / 4][4 * column + k % 4] as i8));
                    let before = i32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]]);
                    sum.copy_from_slice(&products.fold(before, i32::wrapping_add).to_le_bytes());
                }
            }
        });
    }
    unsafe fn panel_rows<const STEPS: usize>(self, panel: *const u8, to: *mut u8) {
        for (row, t) in (0..4).flat_map(|row| (0..STEPS).map(move |t| (row, t))) {
            // SAFETY: see above.
            unsafe { to.add(4 * (STEPS * row + t)).copy_from_nonoverlapping(panel.add(16 * t + 4 * row), 4) };
        }
    }
}
