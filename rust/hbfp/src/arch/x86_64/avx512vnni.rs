//! AVX-512 (F, BW, DQ, VL) with VNNI: sixteen lanes.

use crate::arch::generic::aligned::SixteenLanes;
use crate::arch::simd::Simd;
use std::arch::asm;
use std::arch::x86_64::*;

/// Proof that the CPU has AVX-512 F, BW, DQ, VL and VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Vnni(());

impl Avx512Vnni {
    /// # Safety
    /// The CPU has AVX-512 F, BW, DQ, VL and VNNI.
    #[inline(always)]
    pub(crate) unsafe fn assume() -> Self {
        Self(())
    }
}

/// Wraps intrinsics whose only condition is the CPU level.
macro_rules! level {
    ($e:expr) => {
        // SAFETY: the token proves AVX-512 F, BW, DQ, VL and VNNI.
        unsafe { $e }
    };
}
#[inline(always)]
fn ps(v: __m512i) -> __m512 {
    level!(_mm512_castsi512_ps(v))
}
#[inline(always)]
fn si(v: __m512) -> __m512i {
    level!(_mm512_castps_si512(v))
}

/// The mask of the first `n` ≤ 16 lanes.
#[inline(always)]
fn first(n: usize) -> u16 {
    ((1u32 << n) - 1) as u16
}

impl Simd for Avx512Vnni {
    type V = __m512i;
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(self, x: i32) -> Self::V {
        level!(_mm512_set1_epi32(x))
    }
    #[inline(always)]
    fn splat_f32(self, x: f32) -> Self::V {
        si(level!(_mm512_set1_ps(x)))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const i32) -> Self::V {
        // SAFETY: the token proves the level, the caller 64 readable bytes.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut i32, v: Self::V) {
        // SAFETY: the token proves the level, the caller 64 writable bytes.
        unsafe { _mm512_storeu_si512(p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn store_around(self, p: *mut i32, v: Self::V) {
        // SAFETY: the token proves the level, the caller what pointers reach.
        unsafe { _mm512_stream_si512(p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn fence(self) {
        level!(_mm_sfence());
    }
    #[inline(always)]
    unsafe fn load_first(self, p: *const i32, n: usize) -> Self::V {
        // SAFETY: the token proves the level, the caller n readable words; the others are not touched.
        unsafe { _mm512_maskz_loadu_epi32(first(n), p) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut i32, n: usize, v: Self::V) {
        // SAFETY: the token proves the level, the caller n writable words; the others are not touched.
        unsafe { _mm512_mask_storeu_epi32(p, first(n), v) }
    }
    #[inline(always)]
    fn prefetch(self, p: *const f32) {
        // A prefetch never faults.
        level!(_mm_prefetch::<_MM_HINT_T0>(p.cast()));
    }
    #[inline(always)]
    unsafe fn load_u16(self, p: *const u16) -> Self::V {
        // SAFETY: the token proves the level, the caller 32 readable bytes.
        unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> Self::V {
        // SAFETY: the token proves the level, the caller 16 readable bytes.
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_i16x2(self, p: *mut i16, v: [Self::V; 2]) {
        for (j, v) in v.into_iter().enumerate() {
            // SAFETY: the token proves the level, the caller 64 writable bytes.
            unsafe { _mm256_storeu_si256(p.add(16 * j).cast(), _mm512_cvtepi32_epi16(v)) }
        }
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm512_sub_epi32(a, b))
    }
    #[inline(always)]
    fn min_i32(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm512_min_epi32(a, b))
    }
    #[inline(always)]
    fn max_i32(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm512_max_epi32(a, b))
    }
    #[inline(always)]
    fn and(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm512_and_si512(a, b))
    }
    #[inline(always)]
    fn or(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn xor(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm512_xor_si512(a, b))
    }
    // The shift counts of AVX-512 intrinsics are unsigned; a count in a register compiles to the same instruction.
    #[inline(always)]
    fn shl<const N: i32>(self, a: Self::V) -> Self::V {
        level!(_mm512_sll_epi32(a, _mm_cvtsi32_si128(N)))
    }
    #[inline(always)]
    fn shl_lanes(self, a: Self::V, places: Self::V) -> Self::V {
        level!(_mm512_sllv_epi32(a, places))
    }
    #[inline(always)]
    fn sar<const N: i32>(self, a: Self::V) -> Self::V {
        level!(_mm512_sra_epi32(a, _mm_cvtsi32_si128(N)))
    }
    #[inline(always)]
    fn reduce_max_i32(self, a: Self::V) -> i32 {
        level!(_mm512_reduce_max_epi32(a))
    }

    #[inline(always)]
    fn any_negative(self, a: Self::V) -> bool {
        level!(_mm512_movepi32_mask(a) != 0)
    }

    #[inline(always)]
    fn in_order(self, v: Self::V) -> Self::V {
        level!(pass_in_order(v))
    }

    #[inline(always)]
    fn add_f32(self, a: Self::V, b: Self::V) -> Self::V {
        si(level!(_mm512_add_ps(ps(a), ps(b))))
    }
    #[inline(always)]
    fn sub_f32(self, a: Self::V, b: Self::V) -> Self::V {
        si(level!(_mm512_sub_ps(ps(a), ps(b))))
    }
    #[inline(always)]
    fn mul_f32(self, a: Self::V, b: Self::V) -> Self::V {
        si(level!(_mm512_mul_ps(ps(a), ps(b))))
    }
    #[inline(always)]
    fn mul_add_f32(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        si(level!(_mm512_fmadd_ps(ps(a), ps(b), ps(c))))
    }
    #[inline(always)]
    fn div_f32(self, a: Self::V, b: Self::V) -> Self::V {
        si(level!(_mm512_div_ps(ps(a), ps(b))))
    }
    #[inline(always)]
    fn min_f32(self, a: Self::V, b: Self::V) -> Self::V {
        si(level!(_mm512_min_ps(ps(a), ps(b))))
    }
    #[inline(always)]
    fn max_f32(self, a: Self::V, b: Self::V) -> Self::V {
        si(level!(_mm512_max_ps(ps(a), ps(b))))
    }
    #[inline(always)]
    fn keep_if_ge_f32(self, a: Self::V, b: Self::V, v: Self::V) -> Self::V {
        level!(_mm512_maskz_mov_epi32(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(ps(a), ps(b)), v))
    }
    #[inline(always)]
    fn round_to_i32(self, a: Self::V) -> Self::V {
        level!(_mm512_cvtps_epi32(ps(a)))
    }
    #[inline(always)]
    fn truncate_to_i32(self, a: Self::V) -> Self::V {
        level!(_mm512_cvttps_epi32(ps(a)))
    }
    #[inline(always)]
    fn to_f32(self, a: Self::V) -> Self::V {
        si(level!(_mm512_cvtepi32_ps(a)))
    }

    #[inline(always)]
    fn dot4(self, acc: Self::V, b: Self::V, a: Self::V) -> Self::V {
        level!(_mm512_dpbusd_epi32(acc, b, a))
    }
    #[inline(always)]
    fn mul_pairs(self, b: Self::V, a: Self::V) -> Self::V {
        level!(_mm512_maddubs_epi16(b, a))
    }
    #[inline(always)]
    fn add_i16(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm512_add_epi16(a, b))
    }
    #[inline(always)]
    fn min_i8(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm512_min_epi8(a, b))
    }
    #[inline(always)]
    fn abs_i8(self, a: Self::V) -> Self::V {
        level!(_mm512_abs_epi8(a))
    }
    #[inline(always)]
    fn max_i8(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm512_max_epi8(a, b))
    }
    #[inline(always)]
    fn mul_i16(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm512_mullo_epi16(a, b))
    }
    #[inline(always)]
    fn sum_halves(self, a: Self::V) -> Self::V {
        level!(_mm512_madd_epi16(a, _mm512_set1_epi16(1)))
    }

    #[inline(always)]
    fn mul_halves(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm512_madd_epi16(a, b))
    }
    #[inline(always)]
    fn high_bytes(self, a: Self::V) -> Self::V {
        level!(_mm512_srli_epi16::<8>(a))
    }

    #[inline(always)]
    fn max_of_4(self, [a, b, c, d]: [Self::V; 4]) -> Self::V {
        level!({
            let ab = _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let cd = _mm512_max_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            let m = _mm512_max_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
            let m = _mm512_max_epi32(m, _mm512_shuffle_i32x4::<0b01_00_11_10>(m, m));
            _mm512_max_epi32(m, _mm512_shuffle_i32x4::<0b10_11_00_01>(m, m))
        })
    }
    #[inline(always)]
    fn sum_chunks(self, v: Self::V) -> Self::V {
        level!({
            let v = _mm512_add_epi32(v, _mm512_shuffle_i32x4::<0b01_00_11_10>(v, v));
            _mm512_add_epi32(v, _mm512_shuffle_i32x4::<0b10_11_00_01>(v, v))
        })
    }
    #[inline(always)]
    fn sum_chunks_i16(self, v: Self::V) -> Self::V {
        level!({
            let v = _mm512_add_epi16(v, _mm512_shuffle_i32x4::<0b01_00_11_10>(v, v));
            _mm512_add_epi16(v, _mm512_shuffle_i32x4::<0b10_11_00_01>(v, v))
        })
    }
    #[inline(always)]
    fn splat_in_chunks<const I: i32>(self, v: Self::V) -> Self::V {
        level!(match I {
            0 => _mm512_shuffle_epi32::<0x00>(v),
            1 => _mm512_shuffle_epi32::<0x55>(v),
            2 => _mm512_shuffle_epi32::<0xAA>(v),
            _ => _mm512_shuffle_epi32::<0xFF>(v),
        })
    }
    #[inline(always)]
    fn pack_words(self, [a, b, c, d]: [Self::V; 4]) -> Self::V {
        level!(_mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)))
    }
    #[inline(always)]
    fn transpose_words(self, [a, b, c, d]: [Self::V; 4]) -> [Self::V; 4] {
        level!({
            let (ab0, ab1) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (cd0, cd1) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            [
                _mm512_unpacklo_epi64(ab0, cd0),
                _mm512_unpackhi_epi64(ab0, cd0),
                _mm512_unpacklo_epi64(ab1, cd1),
                _mm512_unpackhi_epi64(ab1, cd1),
            ]
        })
    }
    #[inline(always)]
    fn unzip_words(self, v: Self::V) -> Self::V {
        let from = level!(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        level!(_mm512_permutexvar_epi32(from, v))
    }
    #[inline(always)]
    fn unzip_chunks(self, a: Self::V, b: Self::V) -> [Self::V; 2] {
        level!([_mm512_shuffle_i32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b)])
    }
    #[inline(always)]
    fn interleave_bytes(self, v: [Self::V; 4]) -> Self::V {
        level!({
            let order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            _mm512_shuffle_epi8(self.pack_words(v), _mm512_broadcast_i32x4(order))
        })
    }
    #[inline(always)]
    fn widen_bytes(self, v: Self::V) -> [Self::V; 2] {
        level!({
            let (even, odd) = (_mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(v)), _mm512_srai_epi16::<8>(v));
            [_mm512_unpacklo_epi32(even, odd), _mm512_unpackhi_epi32(even, odd)]
        })
    }
    #[inline(always)]
    unsafe fn store_chunks(self, p: *mut u8, stride: usize, v: Self::V) {
        // SAFETY: the token proves the level, the caller four places of 16 writable bytes.
        unsafe {
            _mm_storeu_si128(p.cast(), _mm512_castsi512_si128(v));
            _mm_storeu_si128(p.add(stride).cast(), _mm512_extracti32x4_epi32::<1>(v));
            _mm_storeu_si128(p.add(2 * stride).cast(), _mm512_extracti32x4_epi32::<2>(v));
            _mm_storeu_si128(p.add(3 * stride).cast(), _mm512_extracti32x4_epi32::<3>(v));
        }
    }
    #[inline(always)]
    fn exchange<const D: usize>(self, v: Self::V) -> Self::V {
        level!(match D {
            1 => _mm512_shuffle_epi32::<0b10_11_00_01>(v),
            2 => _mm512_shuffle_epi32::<0b01_00_11_10>(v),
            _ => _mm512_shuffle_i32x4::<0b10_11_00_01>(v, v),
        })
    }
    #[inline(always)]
    unsafe fn load_chunk(self, p: *const i32) -> Self::V {
        // SAFETY: the token proves the level, the caller 16 readable bytes.
        unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_chunk(self, p: *mut u8, v: Self::V) {
        // SAFETY: the token proves the level, the caller 16 writable bytes.
        unsafe { _mm_storeu_si128(p.cast(), _mm512_castsi512_si128(v)) }
    }

    #[inline(always)]
    fn mul_low_u32(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm512_mul_epu32(a, b))
    }
    #[inline(always)]
    fn high_u32(self, a: Self::V) -> Self::V {
        level!(_mm512_srli_epi64::<32>(a))
    }
    #[inline(always)]
    unsafe fn store_low_halves(self, p: *mut u16, v: Self::V) {
        // SAFETY: the token proves the level, the caller 16 writable bytes.
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtepi64_epi16(v)) }
    }
    #[inline(always)]
    unsafe fn store_counters(self, p: *mut u16, [w0, w1, w2, w3]: [Self::V; 4]) {
        // SAFETY: the token proves the level, the caller 128 writable bytes.
        unsafe {
            // Per 64-bit lane: the first and the second eight bytes of a counter; then the lanes alternate.
            let first = _mm512_mask_mov_epi32(w0, 0xAAAA, _mm512_slli_epi64::<32>(w1));
            let second = _mm512_mask_mov_epi32(w2, 0xAAAA, _mm512_slli_epi64::<32>(w3));
            let low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
            let high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
            _mm512_storeu_si512(p.cast(), _mm512_permutex2var_epi64(first, low, second));
            _mm512_storeu_si512(p.add(32).cast(), _mm512_permutex2var_epi64(first, high, second));
        }
    }
}

impl SixteenLanes for Avx512Vnni {
    #[inline(always)]
    unsafe fn steps_of_lines(self, [a, b, c, d]: [*const u8; 4]) -> Self::V {
        // SAFETY: the token proves the level, the caller what pointers reach.
        unsafe {
            let [a, b, c, d] = [a, b, c, d].map(|line| _mm_loadu_si128(line.cast()));
            let (ab, cd) = (_mm256_set_m128i(b, a), _mm256_set_m128i(d, c));
            let rows = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(ab), cd);
            _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), rows)
        }
    }
}

/// An empty statement that the compiler takes for one that changes `v`.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn pass_in_order(mut v: __m512i) -> __m512i {
    // SAFETY: no instruction.
    unsafe { asm!("/* {0} */", inout(zmm_reg) v, options(nomem, nostack, preserves_flags)) };
    v
}
