//! AVX2 with FMA: eight lanes.

use crate::arch::simd::Simd;
use std::arch::x86_64::*;

/// Proof that the CPU has AVX2 and FMA.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The CPU has AVX2 and FMA.
    #[inline(always)]
    pub(crate) unsafe fn assume() -> Self {
        Self(())
    }
}

/// Wraps intrinsics whose only condition is the CPU level.
macro_rules! level {
    ($e:expr) => {
        // SAFETY: the token proves the level.
        unsafe { $e }
    };
}
#[inline(always)]
fn ps(v: __m256i) -> __m256 {
    level!(_mm256_castsi256_ps(v))
}
#[inline(always)]
fn si(v: __m256) -> __m256i {
    level!(_mm256_castps_si256(v))
}

/// An empty instruction that uses and gives back `v`. Such statements keep their order.
#[inline]
#[target_feature(enable = "avx")]
unsafe fn pass_in_order(mut v: __m256i) -> __m256i {
    // SAFETY: there is no instruction.
    unsafe { std::arch::asm!("/* {0} */", inout(ymm_reg) v, options(nomem, nostack, preserves_flags)) }
    v
}

/// −1 in the first `n` ≤ 8 lanes.
#[inline(always)]
fn first(n: usize) -> __m256i {
    level!(_mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)))
}

impl Simd for Avx2 {
    type V = __m256i;
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(self, x: i32) -> Self::V {
        level!(_mm256_set1_epi32(x))
    }
    #[inline(always)]
    fn splat_f32(self, x: f32) -> Self::V {
        si(level!(_mm256_set1_ps(x)))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const i32) -> Self::V {
        // SAFETY: the token proves the level, the caller 32 readable bytes.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut i32, v: Self::V) {
        // SAFETY: the token proves the level, the caller 32 writable bytes.
        unsafe { _mm256_storeu_si256(p.cast(), v) }
    }
    #[inline(always)]
    fn prefetch(self, p: *const f32) {
        // A prefetch never faults.
        level!(_mm_prefetch::<_MM_HINT_T0>(p.cast()));
    }
    #[inline(always)]
    unsafe fn load_first(self, p: *const i32, n: usize) -> Self::V {
        // SAFETY: the token proves the level, the caller n readable words; the others are not touched.
        unsafe { _mm256_maskload_epi32(p, first(n)) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut i32, n: usize, v: Self::V) {
        // SAFETY: the token proves the level, the caller n writable words; the others are not touched.
        unsafe { _mm256_maskstore_epi32(p, first(n), v) }
    }
    #[inline(always)]
    unsafe fn load_u16(self, p: *const u16) -> Self::V {
        // SAFETY: the token proves the level, the caller 16 readable bytes.
        unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> Self::V {
        // SAFETY: the token proves the level, the caller 8 readable bytes.
        unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_i16x2(self, p: *mut i16, [a, b]: [Self::V; 2]) {
        // SAFETY: the token proves the level, the caller 32 writable bytes.
        unsafe { _mm256_storeu_si256(p.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b))) }
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm256_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm256_sub_epi32(a, b))
    }
    #[inline(always)]
    fn min_i32(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm256_min_epi32(a, b))
    }
    #[inline(always)]
    fn max_i32(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm256_max_epi32(a, b))
    }
    #[inline(always)]
    fn and(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm256_and_si256(a, b))
    }
    #[inline(always)]
    fn or(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm256_or_si256(a, b))
    }
    #[inline(always)]
    fn xor(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm256_xor_si256(a, b))
    }
    #[inline(always)]
    fn shl<const N: i32>(self, a: Self::V) -> Self::V {
        level!(_mm256_slli_epi32::<N>(a))
    }
    #[inline(always)]
    fn shl_lanes(self, a: Self::V, places: Self::V) -> Self::V {
        level!(_mm256_sllv_epi32(a, places))
    }
    #[inline(always)]
    fn sar<const N: i32>(self, a: Self::V) -> Self::V {
        level!(_mm256_srai_epi32::<N>(a))
    }
    #[inline(always)]
    fn reduce_max_i32(self, a: Self::V) -> i32 {
        level!({
            let x = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            let x = _mm_max_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
            _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
        })
    }

    #[inline(always)]
    fn any_negative(self, a: Self::V) -> bool {
        level!(_mm256_movemask_ps(ps(a)) != 0)
    }
    #[inline(always)]
    fn in_order(self, v: Self::V) -> Self::V {
        level!(pass_in_order(v))
    }

    #[inline(always)]
    fn add_f32(self, a: Self::V, b: Self::V) -> Self::V {
        si(level!(_mm256_add_ps(ps(a), ps(b))))
    }
    #[inline(always)]
    fn sub_f32(self, a: Self::V, b: Self::V) -> Self::V {
        si(level!(_mm256_sub_ps(ps(a), ps(b))))
    }
    #[inline(always)]
    fn mul_f32(self, a: Self::V, b: Self::V) -> Self::V {
        si(level!(_mm256_mul_ps(ps(a), ps(b))))
    }
    #[inline(always)]
    fn mul_add_f32(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        si(level!(_mm256_fmadd_ps(ps(a), ps(b), ps(c))))
    }
    #[inline(always)]
    fn div_f32(self, a: Self::V, b: Self::V) -> Self::V {
        si(level!(_mm256_div_ps(ps(a), ps(b))))
    }
    #[inline(always)]
    fn min_f32(self, a: Self::V, b: Self::V) -> Self::V {
        si(level!(_mm256_min_ps(ps(a), ps(b))))
    }
    #[inline(always)]
    fn max_f32(self, a: Self::V, b: Self::V) -> Self::V {
        si(level!(_mm256_max_ps(ps(a), ps(b))))
    }
    #[inline(always)]
    fn keep_if_ge_f32(self, a: Self::V, b: Self::V, v: Self::V) -> Self::V {
        level!(_mm256_and_si256(si(_mm256_cmp_ps::<_CMP_GE_OQ>(ps(a), ps(b))), v))
    }
    #[inline(always)]
    fn round_to_i32(self, a: Self::V) -> Self::V {
        level!(_mm256_cvtps_epi32(ps(a)))
    }
    #[inline(always)]
    fn truncate_to_i32(self, a: Self::V) -> Self::V {
        level!(_mm256_cvttps_epi32(ps(a)))
    }
    #[inline(always)]
    fn to_f32(self, a: Self::V) -> Self::V {
        si(level!(_mm256_cvtepi32_ps(a)))
    }

    #[inline(always)]
    fn dot4(self, acc: Self::V, b: Self::V, a: Self::V) -> Self::V {
        // vpmaddubsw would saturate at 8 bits: even and odd bytes are widened to 16 bits and multiplied exactly.
        level!({
            let low = _mm256_set1_epi16(0xFF);
            let even = _mm256_madd_epi16(_mm256_and_si256(b, low), _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(a)));
            let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(b), _mm256_srai_epi16::<8>(a));
            _mm256_add_epi32(acc, _mm256_add_epi32(even, odd))
        })
    }
    #[inline(always)]
    fn dot4_small(self, acc: Self::V, b: Self::V, a: Self::V) -> Self::V {
        self.add(acc, self.sum_halves(self.mul_pairs(b, a)))
    }
    #[inline(always)]
    fn mul_pairs(self, b: Self::V, a: Self::V) -> Self::V {
        level!(_mm256_maddubs_epi16(b, a))
    }
    #[inline(always)]
    fn add_i16(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm256_add_epi16(a, b))
    }
    #[inline(always)]
    fn min_i8(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm256_min_epi8(a, b))
    }
    #[inline(always)]
    fn abs_i8(self, a: Self::V) -> Self::V {
        level!(_mm256_abs_epi8(a))
    }
    #[inline(always)]
    fn max_i8(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm256_max_epi8(a, b))
    }
    #[inline(always)]
    fn mul_i16(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm256_mullo_epi16(a, b))
    }
    #[inline(always)]
    fn sum_halves(self, a: Self::V) -> Self::V {
        level!(_mm256_madd_epi16(a, _mm256_set1_epi16(1)))
    }

    #[inline(always)]
    fn mul_halves(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm256_madd_epi16(a, b))
    }
    #[inline(always)]
    fn high_bytes(self, a: Self::V) -> Self::V {
        level!(_mm256_srli_epi16::<8>(a))
    }

    #[inline(always)]
    fn max_of_4(self, [a, b, c, d]: [Self::V; 4]) -> Self::V {
        level!({
            let ab = _mm256_max_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
            let cd = _mm256_max_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
            let m = _mm256_max_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
            _mm256_max_epi32(m, _mm256_permute2x128_si256::<1>(m, m))
        })
    }
    #[inline(always)]
    fn sum_chunks(self, v: Self::V) -> Self::V {
        level!(_mm256_add_epi32(v, _mm256_permute2x128_si256::<1>(v, v)))
    }
    #[inline(always)]
    fn sum_chunks_i16(self, v: Self::V) -> Self::V {
        level!(_mm256_add_epi16(v, _mm256_permute2x128_si256::<1>(v, v)))
    }
    #[inline(always)]
    fn splat_in_chunks<const I: i32>(self, v: Self::V) -> Self::V {
        level!(match I {
            0 => _mm256_shuffle_epi32::<0x00>(v),
            1 => _mm256_shuffle_epi32::<0x55>(v),
            2 => _mm256_shuffle_epi32::<0xAA>(v),
            _ => _mm256_shuffle_epi32::<0xFF>(v),
        })
    }
    #[inline(always)]
    fn pack_words(self, [a, b, c, d]: [Self::V; 4]) -> Self::V {
        level!(_mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)))
    }
    #[inline(always)]
    fn transpose_words(self, [a, b, c, d]: [Self::V; 4]) -> [Self::V; 4] {
        level!({
            let (ab0, ab1) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
            let (cd0, cd1) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
            [
                _mm256_unpacklo_epi64(ab0, cd0),
                _mm256_unpackhi_epi64(ab0, cd0),
                _mm256_unpacklo_epi64(ab1, cd1),
                _mm256_unpackhi_epi64(ab1, cd1),
            ]
        })
    }
    #[inline(always)]
    fn unzip_words(self, v: Self::V) -> Self::V {
        level!(_mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)))
    }
    #[inline(always)]
    fn unzip_chunks(self, a: Self::V, b: Self::V) -> [Self::V; 2] {
        level!([_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b)])
    }
    #[inline(always)]
    fn interleave_bytes(self, v: [Self::V; 4]) -> Self::V {
        level!({
            let order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            _mm256_shuffle_epi8(self.pack_words(v), _mm256_broadcastsi128_si256(order))
        })
    }
    #[inline(always)]
    fn widen_bytes(self, v: Self::V) -> [Self::V; 2] {
        level!({
            let (even, odd) = (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(v)), _mm256_srai_epi16::<8>(v));
            [_mm256_unpacklo_epi32(even, odd), _mm256_unpackhi_epi32(even, odd)]
        })
    }
    #[inline(always)]
    unsafe fn store_chunks(self, p: *mut u8, stride: usize, v: Self::V) {
        // SAFETY: the token proves the level, the caller two places of 16 writable bytes.
        unsafe {
            _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(v));
            _mm_storeu_si128(p.add(stride).cast(), _mm256_extracti128_si256::<1>(v));
        }
    }
    #[inline(always)]
    fn exchange<const D: usize>(self, v: Self::V) -> Self::V {
        level!(match D {
            1 => _mm256_shuffle_epi32::<0b10_11_00_01>(v),
            2 => _mm256_shuffle_epi32::<0b01_00_11_10>(v),
            _ => _mm256_permute4x64_epi64::<0b01_00_11_10>(v),
        })
    }
    #[inline(always)]
    unsafe fn load_chunk(self, p: *const i32) -> Self::V {
        // SAFETY: the token proves the level, the caller 16 readable bytes.
        unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_chunk(self, p: *mut u8, v: Self::V) {
        // SAFETY: the token proves the level, the caller 16 writable bytes.
        unsafe { _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(v)) }
    }

    #[inline(always)]
    fn mul_low_u32(self, a: Self::V, b: Self::V) -> Self::V {
        level!(_mm256_mul_epu32(a, b))
    }
    #[inline(always)]
    fn high_u32(self, a: Self::V) -> Self::V {
        level!(_mm256_srli_epi64::<32>(a))
    }
    #[inline(always)]
    unsafe fn store_low_halves(self, p: *mut u16, v: Self::V) {
        // SAFETY: the token proves the level, the caller 8 writable bytes.
        unsafe {
            let order = _mm256_set1_epi64x(0x0908_0100);
            let pairs = _mm256_shuffle_epi8(v, order);
            let (low, high) = (_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
            _mm_storel_epi64(p.cast(), _mm_unpacklo_epi32(low, high));
        }
    }
    #[inline(always)]
    unsafe fn store_counters(self, p: *mut u16, [w0, w1, w2, w3]: [Self::V; 4]) {
        // SAFETY: the token proves the level, the caller 64 writable bytes.
        unsafe {
            // Per 64-bit lane: the first and the second eight bytes of a counter.
            let first = _mm256_blend_epi32::<0b1010_1010>(w0, _mm256_slli_epi64::<32>(w1));
            let second = _mm256_blend_epi32::<0b1010_1010>(w2, _mm256_slli_epi64::<32>(w3));
            let even = _mm256_unpacklo_epi64(first, second);
            let odd = _mm256_unpackhi_epi64(first, second);
            // By halves: moving them across would cost more than two more stores.
            _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(even));
            _mm_storeu_si128(p.add(8).cast(), _mm256_castsi256_si128(odd));
            _mm_storeu_si128(p.add(16).cast(), _mm256_extracti128_si256::<1>(even));
            _mm_storeu_si128(p.add(24).cast(), _mm256_extracti128_si256::<1>(odd));
        }
    }
}
