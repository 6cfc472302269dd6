//! The scalar level: the vector operations on plain arrays, for every architecture.
//!
//! With 8 and 16 lanes it is also the model on which the generic kernels of the AVX2 and the AVX-512 level are tested
//! on machines that lack those instructions.

use super::simd::Simd;
use std::array::from_fn;

/// `N` lanes in an array.
#[derive(Clone, Copy)]
pub(crate) struct Scalar<const N: usize>;

type Lanes<const N: usize> = [u32; N];

#[inline(always)]
fn map<const N: usize>(a: Lanes<N>, f: impl Fn(u32) -> u32) -> Lanes<N> {
    from_fn(|i| f(a[i]))
}
#[inline(always)]
fn zip<const N: usize>(a: Lanes<N>, b: Lanes<N>, f: impl Fn(u32, u32) -> u32) -> Lanes<N> {
    from_fn(|i| f(a[i], b[i]))
}
#[inline(always)]
fn zip_f32<const N: usize>(a: Lanes<N>, b: Lanes<N>, f: impl Fn(f32, f32) -> f32) -> Lanes<N> {
    from_fn(|i| f(f32::from_bits(a[i]), f32::from_bits(b[i])).to_bits())
}
#[inline(always)]
fn zip_bytes<const N: usize>(a: Lanes<N>, b: Lanes<N>, f: impl Fn(i8, i8) -> i8) -> Lanes<N> {
    zip(a, b, |a, b| {
        let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
        u32::from_le_bytes(from_fn(|i| f(a[i] as i8, b[i] as i8) as u8))
    })
}
/// To nearest even without a library call: adding 2^23 leaves no fraction bits, and the addition rounds.
#[inline(always)]
fn round_ties_even(x: f32) -> f32 {
    const TWO_23: f32 = 8_388_608.0;
    let a = x.abs();
    (if a < TWO_23 { (a + TWO_23) - TWO_23 } else { a }).copysign(x)
}
#[inline(always)]
fn pair(b: u32, a: u32, byte: u32) -> i32 {
    let product = |i: u32| ((b >> (8 * i)) & 0xFF) as i32 * i32::from((a >> (8 * i)) as i8);
    product(byte) + product(byte + 1)
}

/// The low bytes of four codes, the first one lowest.
#[inline(always)]
fn word(codes: [u32; 4]) -> u32 {
    u32::from_le_bytes(codes.map(|x| (x as i32).clamp(-128, 127) as u8))
}

impl<const N: usize> Simd for Scalar<N> {
    type V = Lanes<N>;
    const LANES: usize = N;

    #[inline(always)]
    fn splat(self, x: i32) -> Self::V {
        [x as u32; N]
    }
    #[inline(always)]
    fn splat_f32(self, x: f32) -> Self::V {
        [x.to_bits(); N]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const i32) -> Self::V {
        // SAFETY: the caller vouches for N words.
        unsafe { p.cast::<Lanes<N>>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut i32, v: Self::V) {
        // SAFETY: the caller vouches for N words.
        unsafe { p.cast::<Lanes<N>>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_around(self, p: *mut i32, v: Self::V) {
        assert!((p as usize).is_multiple_of(4 * N), "a store around the caches that is no cache line");
        // SAFETY: the caller's word.
        unsafe { self.store(p, v) }
    }
    #[inline(always)]
    unsafe fn load_first(self, p: *const i32, n: usize) -> Self::V {
        // SAFETY: the caller vouches for n words.
        from_fn(|i| if i < n { unsafe { p.cast::<u32>().add(i).read_unaligned() } } else { 0 })
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut i32, n: usize, v: Self::V) {
        for (i, &v) in v.iter().enumerate().take(n) {
            // SAFETY: the caller vouches for n words.
            unsafe { p.cast::<u32>().add(i).write_unaligned(v) }
        }
    }
    #[inline(always)]
    unsafe fn load_u16(self, p: *const u16) -> Self::V {
        // SAFETY: the caller vouches for N halves.
        let h = unsafe { p.cast::<[u16; N]>().read_unaligned() };
        from_fn(|i| u32::from(h[i]))
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> Self::V {
        // SAFETY: the caller vouches for N bytes.
        let b = unsafe { p.cast::<[u8; N]>().read_unaligned() };
        from_fn(|i| u32::from(b[i]))
    }
    #[inline(always)]
    unsafe fn store_i16x2(self, p: *mut i16, v: [Self::V; 2]) {
        for (j, v) in v.into_iter().enumerate() {
            let halves: [i16; N] = from_fn(|i| v[i] as i16);
            // SAFETY: the caller vouches for 2 N halves.
            unsafe { p.add(j * N).cast::<[i16; N]>().write_unaligned(halves) }
        }
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, u32::wrapping_add)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, u32::wrapping_sub)
    }
    #[inline(always)]
    fn min_i32(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| (a as i32).min(b as i32) as u32)
    }
    #[inline(always)]
    fn max_i32(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| (a as i32).max(b as i32) as u32)
    }
    #[inline(always)]
    fn and(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn or(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a | b)
    }
    #[inline(always)]
    fn xor(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a ^ b)
    }
    #[inline(always)]
    fn shl<const S: i32>(self, a: Self::V) -> Self::V {
        map(a, |a| a << S)
    }
    #[inline(always)]
    fn shl_lanes(self, a: Self::V, places: Self::V) -> Self::V {
        zip(a, places, |a, places| a << places)
    }
    #[inline(always)]
    fn sar<const S: i32>(self, a: Self::V) -> Self::V {
        map(a, |a| (a as i32 >> S) as u32)
    }
    #[inline(always)]
    fn reduce_max_i32(self, a: Self::V) -> i32 {
        a.iter().fold(i32::MIN, |m, &x| m.max(x as i32))
    }

    #[inline(always)]
    fn any_negative(self, a: Self::V) -> bool {
        a.iter().any(|&x| (x as i32) < 0)
    }

    #[inline(always)]
    fn add_f32(self, a: Self::V, b: Self::V) -> Self::V {
        zip_f32(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub_f32(self, a: Self::V, b: Self::V) -> Self::V {
        zip_f32(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul_f32(self, a: Self::V, b: Self::V) -> Self::V {
        zip_f32(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn mul_add_f32(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        from_fn(|i| f32::from_bits(a[i]).mul_add(f32::from_bits(b[i]), f32::from_bits(c[i])).to_bits())
    }
    #[inline(always)]
    fn div_f32(self, a: Self::V, b: Self::V) -> Self::V {
        zip_f32(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn min_f32(self, a: Self::V, b: Self::V) -> Self::V {
        zip_f32(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max_f32(self, a: Self::V, b: Self::V) -> Self::V {
        zip_f32(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn keep_if_ge_f32(self, a: Self::V, b: Self::V, v: Self::V) -> Self::V {
        from_fn(|i| if f32::from_bits(a[i]) >= f32::from_bits(b[i]) { v[i] } else { 0 })
    }
    #[inline(always)]
    fn round_to_i32(self, a: Self::V) -> Self::V {
        map(a, |a| round_ties_even(f32::from_bits(a)) as i32 as u32)
    }
    #[inline(always)]
    fn truncate_to_i32(self, a: Self::V) -> Self::V {
        map(a, |a| f32::from_bits(a) as i32 as u32)
    }
    #[inline(always)]
    fn to_f32(self, a: Self::V) -> Self::V {
        map(a, |a| (a as i32 as f32).to_bits())
    }

    #[inline(always)]
    fn dot4(self, acc: Self::V, b: Self::V, a: Self::V) -> Self::V {
        from_fn(|i| acc[i].wrapping_add((pair(b[i], a[i], 0) + pair(b[i], a[i], 2)) as u32))
    }
    #[inline(always)]
    fn mul_pairs(self, b: Self::V, a: Self::V) -> Self::V {
        zip(b, a, |b, a| {
            let (low, high) = (pair(b, a, 0), pair(b, a, 2));
            debug_assert!(i16::try_from(low).is_ok() && i16::try_from(high).is_ok());
            (low as u32 & 0xFFFF) | ((high as u32) << 16)
        })
    }
    #[inline(always)]
    fn add_i16(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| (a.wrapping_add(b) & 0xFFFF) | ((a >> 16).wrapping_add(b >> 16) << 16))
    }
    #[inline(always)]
    fn min_i8(self, a: Self::V, b: Self::V) -> Self::V {
        zip_bytes(a, b, i8::min)
    }
    #[inline(always)]
    fn abs_i8(self, a: Self::V) -> Self::V {
        zip_bytes(a, a, |a, _| a.wrapping_abs())
    }
    #[inline(always)]
    fn max_i8(self, a: Self::V, b: Self::V) -> Self::V {
        zip_bytes(a, b, i8::max)
    }
    #[inline(always)]
    fn mul_i16(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| (a.wrapping_mul(b) & 0xFFFF) | ((a >> 16).wrapping_mul(b >> 16) << 16))
    }
    #[inline(always)]
    fn sum_halves(self, a: Self::V) -> Self::V {
        map(a, |a| (i32::from(a as i16) + (a as i32 >> 16)) as u32)
    }

    #[inline(always)]
    fn mul_halves(self, a: Self::V, b: Self::V) -> Self::V {
        let half = |x: u32| [i32::from(x as i16), x as i32 >> 16];
        zip(a, b, |a, b| (half(a)[0] * half(b)[0]).wrapping_add(half(a)[1] * half(b)[1]) as u32)
    }
    #[inline(always)]
    fn high_bytes(self, a: Self::V) -> Self::V {
        map(a, |a| (a >> 8) & 0x00FF_00FF)
    }

    #[inline(always)]
    fn max_of_4(self, v: [Self::V; 4]) -> Self::V {
        let top: [u32; 4] = from_fn(|i| self.reduce_max_i32(v[i]) as u32);
        from_fn(|i| top[i % 4])
    }
    #[inline(always)]
    fn sum_chunks(self, v: Self::V) -> Self::V {
        from_fn(|i| v.iter().skip(i % 4).step_by(4).fold(0u32, |sum, &x| sum.wrapping_add(x)))
    }
    #[inline(always)]
    fn sum_chunks_i16(self, v: Self::V) -> Self::V {
        from_fn(|i| v.iter().skip(i % 4).step_by(4).fold([0u32], |[sum], &x| Scalar::<1>.add_i16([sum], [x]))[0])
    }
    #[inline(always)]
    fn splat_in_chunks<const I: i32>(self, v: Self::V) -> Self::V {
        from_fn(|i| v[i / 4 * 4 + I as usize])
    }
    #[inline(always)]
    fn pack_words(self, v: [Self::V; 4]) -> Self::V {
        // Word i of chunk c is number i * N / 4 + c: four codes of register i.
        from_fn(|lane| {
            let (chunk, i) = (lane / 4, lane % 4);
            word(from_fn(|j| v[i][4 * chunk + j]))
        })
    }
    #[inline(always)]
    fn transpose_words(self, v: [Self::V; 4]) -> [Self::V; 4] {
        from_fn(|j| from_fn(|lane| v[lane % 4][lane / 4 * 4 + j]))
    }
    #[inline(always)]
    fn unzip_words(self, v: Self::V) -> Self::V {
        let chunks = N / 4;
        from_fn(|i| v[4 * (i % chunks) + i / chunks])
    }
    #[inline(always)]
    fn unzip_chunks(self, a: Self::V, b: Self::V) -> [Self::V; 2] {
        from_fn(|odd| {
            from_fn(|lane| {
                let (chunk, from) = (lane / 4 % (N / 8), if lane < N / 2 { &a } else { &b });
                from[4 * (2 * chunk + odd) + lane % 4]
            })
        })
    }
    #[inline(always)]
    fn interleave_bytes(self, v: [Self::V; 4]) -> Self::V {
        from_fn(|lane| word(from_fn(|j| v[j][lane])))
    }
    #[inline(always)]
    fn widen_bytes(self, v: Self::V) -> [Self::V; 2] {
        let extend = |x: u32| u32::from(x as u8 as i8 as i16 as u16);
        let pair = |x: u32, i: u32| extend(x >> (8 * i)) | (extend(x >> (8 * i + 16)) << 16);
        from_fn(|r| from_fn(|lane| pair(v[lane / 4 * 4 + 2 * r + lane % 4 / 2], lane as u32 % 2)))
    }
    #[inline(always)]
    unsafe fn store_chunks(self, p: *mut u8, stride: usize, v: Self::V) {
        for (c, chunk) in v.chunks_exact(4).enumerate() {
            // SAFETY: the caller vouches for 16 bytes at every stride.
            unsafe { p.add(c * stride).cast::<[u32; 4]>().write_unaligned([chunk[0], chunk[1], chunk[2], chunk[3]]) }
        }
    }
    #[inline(always)]
    fn exchange<const D: usize>(self, v: Self::V) -> Self::V {
        from_fn(|i| v[i ^ D])
    }
    #[inline(always)]
    unsafe fn load_chunk(self, p: *const i32) -> Self::V {
        // SAFETY: the caller vouches for 16 bytes.
        let words = unsafe { p.cast::<[u32; 4]>().read_unaligned() };
        from_fn(|i| words[i % 4])
    }
    #[inline(always)]
    unsafe fn store_chunk(self, p: *mut u8, v: Self::V) {
        // SAFETY: the caller vouches for 16 bytes.
        unsafe { p.cast::<[u32; 4]>().write_unaligned([v[0], v[1], v[2], v[3]]) }
    }

    #[inline(always)]
    fn mul_low_u32(self, a: Self::V, b: Self::V) -> Self::V {
        let mut out = [0; N];
        for i in (0..N).step_by(2) {
            let p = u64::from(a[i]) * u64::from(b[i]);
            (out[i], out[i + 1]) = (p as u32, (p >> 32) as u32);
        }
        out
    }
    #[inline(always)]
    fn high_u32(self, a: Self::V) -> Self::V {
        let mut out = [0; N];
        for i in (0..N).step_by(2) {
            out[i] = a[i + 1];
        }
        out
    }
    #[inline(always)]
    unsafe fn store_low_halves(self, p: *mut u16, v: Self::V) {
        for lane in 0..N / 2 {
            // SAFETY: the caller vouches for N / 2 halves.
            unsafe { p.add(lane).write_unaligned(v[2 * lane] as u16) }
        }
    }
    #[inline(always)]
    unsafe fn store_counters(self, p: *mut u16, words: [Self::V; 4]) {
        for counter in 0..N / 2 {
            for (w, word) in words.iter().enumerate() {
                let word = word[2 * counter];
                // SAFETY: the caller vouches for 4 N halves; 8 counter + 2 w + 1 is below that.
                unsafe {
                    p.add(8 * counter + 2 * w).write_unaligned(word as u16);
                    p.add(8 * counter + 2 * w + 1).write_unaligned((word >> 16) as u16);
                }
            }
        }
    }
}
