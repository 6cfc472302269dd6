//! AMX with 8-bit integers (AMX-TILE, AMX-INT8) beside AVX-512: the matrix unit of Intel's server CPUs.
//!
//! The intrinsics are not stable in Rust, so that these are the instructions themselves. The compiler knows nothing of the
//! tile registers and never uses them; each statement is a barrier for memory, so that their order is the program's.

use super::avx512vnni::Avx512Vnni;
use crate::arch::generic::matrix_unit::MatrixUnit;
use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

/// Whether the CPU has the unit, the operating system keeps its registers, and the process may use it: asked once.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        // Intel SDM, volume 2, CPUID: leaf 7, EDX bits 24 (AMX-TILE) and 25 (AMX-INT8); leaf 1, ECX bit 27 (OSXSAVE).
        let has = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx >> 24 & 3 == 3 && __cpuid(1).ecx >> 27 & 1 == 1;
        has && saved_by_the_system() && permitted()
    })
}

/// Whether the system saves tile registers: XCR0, bits 17 and 18.
fn saved_by_the_system() -> bool {
    let low: u32;
    // SAFETY: the CPU has XGETBV, for it says OSXSAVE.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _, options(nomem, nostack, preserves_flags)) };
    low >> 17 & 3 == 3
}

/// Linux wants to be asked for these registers, once for a process (Documentation/arch/x86/xstate.rst). It refuses where a
/// thread's alternate signal stack has no room for them.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// Other systems: not tried.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The operand of LDTILECFG, palette 1 (Intel SDM, volume 1, section 18.3): shapes of the eight registers.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// An instruction on the register that a constant names.
macro_rules! on_register {
    ($register:ident, $before:literal, $after:literal, $($operand:tt)*) => {
        match $register {
            0 => asm!(concat!($before, "tmm0", $after), $($operand)*),
            1 => asm!(concat!($before, "tmm1", $after), $($operand)*),
            2 => asm!(concat!($before, "tmm2", $after), $($operand)*),
            3 => asm!(concat!($before, "tmm3", $after), $($operand)*),
            4 => asm!(concat!($before, "tmm4", $after), $($operand)*),
            5 => asm!(concat!($before, "tmm5", $after), $($operand)*),
            6 => asm!(concat!($before, "tmm6", $after), $($operand)*),
            _ => asm!(concat!($before, "tmm7", $after), $($operand)*),
        }
    };
}

// SAFETY of the blocks below: the callers vouch for the unit and its configuration, and for what pointers reach.
impl MatrixUnit for Avx512Vnni {
    type Before = Configuration;

    #[inline(always)]
    unsafe fn configure(self, steps: usize) -> Configuration {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        row_bytes[..8].copy_from_slice(&[64, 64, 64, 64, 4 * steps as u16, 4 * steps as u16, 64, 64]);
        rows[..8].copy_from_slice(&[16, 16, 16, 16, 16, 16, steps as u8, steps as u8]);
        let wanted = Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
        let mut before = Configuration { palette: 0, row_bytes: [0; 16], rows: [0; 16], ..wanted };
        // SAFETY: see above.
        unsafe {
            asm!("sttilecfg [{0}]", in(reg) &raw mut before, options(nostack, preserves_flags));
            asm!("ldtilecfg [{0}]", in(reg) &raw const wanted, options(nostack, preserves_flags));
        }
        before
    }
    #[inline(always)]
    unsafe fn restore(self, before: Configuration) {
        // SAFETY: see above. Palette 0, nothing configured, releases the registers.
        unsafe { asm!("ldtilecfg [{0}]", in(reg) &raw const before, options(nostack, preserves_flags)) };
    }
    #[inline(always)]
    unsafe fn store_sums<const T: usize>(self, to: *mut i32) {
        // SAFETY: see above.
        unsafe {
            on_register!(T, "tilestored [{0} + {1}], ", "", in(reg) to, in(reg) 64usize, options(nostack, preserves_flags));
        }
    }
    #[inline(always)]
    unsafe fn clear<const T: usize>(self) {
        // SAFETY: see above.
        unsafe { on_register!(T, "tilezero ", "", options(nomem, nostack, preserves_flags)) }
    }
    #[inline(always)]
    unsafe fn fill<const T: usize>(self, from: *const u8, stride: usize) {
        // SAFETY: see above.
        unsafe {
            on_register!(T, "tileloadd ", ", [{0} + {1}]", in(reg) from, in(reg) stride, options(nostack, preserves_flags, readonly));
        }
    }
    #[inline(always)]
    unsafe fn fill_passing<const T: usize>(self, from: *const u8, stride: usize) {
        // SAFETY: see above.
        unsafe {
            on_register!(T, "tileloaddt1 ", ", [{0} + {1}]", in(reg) from, in(reg) stride, options(nostack, preserves_flags, readonly));
        }
    }
    #[inline(always)]
    unsafe fn multiply<const SUMS: usize, const LEFT: usize, const RIGHT: usize>(self) {
        // SAFETY: see above.
        unsafe {
            match (SUMS, LEFT, RIGHT) {
                (0, 4, 6) => asm!("tdpbssd tmm0, tmm4, tmm6", options(nomem, nostack, preserves_flags)),
                (1, 4, 7) => asm!("tdpbssd tmm1, tmm4, tmm7", options(nomem, nostack, preserves_flags)),
                (2, 5, 6) => asm!("tdpbssd tmm2, tmm5, tmm6", options(nomem, nostack, preserves_flags)),
                (3, 5, 7) => asm!("tdpbssd tmm3, tmm5, tmm7", options(nomem, nostack, preserves_flags)),
                _ => unreachable!(),
            }
        }
    }
    #[inline(always)]
    unsafe fn panel_rows<const STEPS: usize>(self, panel: *const u8, to: *mut u8) {
        // SAFETY: see above.
        unsafe {
            if STEPS == 8 {
                let (a, b) = (both(panel), both(panel.add(16)));
                let (c, d) = (both(panel.add(32)), both(panel.add(48)));
                let (ab0, ab1) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
                let (cd0, cd1) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
                _mm256_storeu_si256(to.cast(), _mm256_unpacklo_epi64(ab0, cd0));
                _mm256_storeu_si256(to.add(32).cast(), _mm256_unpackhi_epi64(ab0, cd0));
                _mm256_storeu_si256(to.add(64).cast(), _mm256_unpacklo_epi64(ab1, cd1));
                _mm256_storeu_si256(to.add(96).cast(), _mm256_unpackhi_epi64(ab1, cd1));
                return;
            }
            let (a, b) = (every_fourth(panel), every_fourth(panel.add(16)));
            let (c, d) = (every_fourth(panel.add(32)), every_fourth(panel.add(48)));
            let (ab0, ab1) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (cd0, cd1) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            _mm512_storeu_si512(to.cast(), _mm512_unpacklo_epi64(ab0, cd0));
            _mm512_storeu_si512(to.add(64).cast(), _mm512_unpackhi_epi64(ab0, cd0));
            _mm512_storeu_si512(to.add(128).cast(), _mm512_unpacklo_epi64(ab1, cd1));
            _mm512_storeu_si512(to.add(192).cast(), _mm512_unpackhi_epi64(ab1, cd1));
        }
    }
}

/// A step, and the fourth one after it, in each of which a word is a row.
///
/// # Safety
/// `steps` is valid for reading 5 steps of 16 bytes.
#[inline(always)]
unsafe fn both(steps: *const u8) -> __m256i {
    // SAFETY: the caller's word.
    unsafe {
        let first = _mm256_castsi128_si256(_mm_loadu_si128(steps.cast()));
        _mm256_inserti128_si256::<1>(first, _mm_loadu_si128(steps.add(64).cast()))
    }
}

/// Every fourth step of 13.
///
/// # Safety
/// `steps` is valid for reading 13 steps of 16 bytes.
#[inline(always)]
unsafe fn every_fourth(steps: *const u8) -> __m512i {
    // SAFETY: the caller's word.
    unsafe { _mm512_inserti64x4::<1>(_mm512_castsi256_si512(both(steps)), both(steps.add(128))) }
}
