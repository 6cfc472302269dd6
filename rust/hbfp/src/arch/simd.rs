//! The vector operations that the generic kernels are written in.
//!
//! A value of a type that implements [`Simd`] is a *token*: it exists only where the CPU can run the level, so all
//! operations on registers are safe to call; only memory accesses are not. A register holds `LANES` 32-bit lanes, read
//! as i32, f32, four bytes, two 16-bit halves or (in pairs) 64-bit integers, as the operation says.

/// Vector operations of one CPU level. Floating-point operations are IEEE single precision, to nearest even, without
/// contraction; integer operations wrap.
pub(crate) trait Simd: Copy {
    /// A register.
    type V: Copy;
    /// 32-bit lanes of a register: 8 or 16.
    const LANES: usize;

    /// All lanes hold `x`.
    fn splat(self, x: i32) -> Self::V;
    /// All lanes hold `x`.
    fn splat_f32(self, x: f32) -> Self::V;

    /// # Safety
    /// `p` is valid for reading `LANES` words; no alignment is needed.
    unsafe fn load(self, p: *const i32) -> Self::V;
    /// # Safety
    /// `p` is valid for writing `LANES` words; no alignment is needed.
    unsafe fn store(self, p: *mut i32, v: Self::V);
    /// A register around the caches, where it is a cache line; for other threads after [`Simd::fence`].
    /// # Safety
    /// `p` is valid for writing a register, and a multiple of its size.
    #[inline(always)]
    unsafe fn store_around(self, p: *mut i32, v: Self::V) {
        // SAFETY: the caller's word.
        unsafe { self.store(p, v) }
    }
    /// What went around the caches is there for other threads.
    /// # Safety
    /// None beyond the token's.
    #[inline(always)]
    unsafe fn fence(self) {}
    /// The first `n` ≤ LANES lanes, zeros after them.
    /// # Safety
    /// `p` is valid for reading `n` words; no alignment is needed.
    unsafe fn load_first(self, p: *const i32, n: usize) -> Self::V;
    /// The first `n` ≤ LANES lanes.
    /// # Safety
    /// `p` is valid for writing `n` words; no alignment is needed.
    unsafe fn store_first(self, p: *mut i32, n: usize, v: Self::V);
    /// Asks for the cache line at `p`, which need not exist.
    #[inline(always)]
    fn prefetch(self, p: *const f32) {
        let _ = p;
    }
    /// `LANES` u16 widened to lanes.
    /// # Safety
    /// `p` is valid for reading `LANES` u16; no alignment is needed.
    unsafe fn load_u16(self, p: *const u16) -> Self::V;
    /// `LANES` bytes widened to lanes.
    /// # Safety
    /// `p` is valid for reading `LANES` bytes; no alignment is needed.
    unsafe fn load_u8(self, p: *const u8) -> Self::V;
    /// The low halves of all lanes of two registers, in order; every lane fits an i16.
    /// # Safety
    /// `p` is valid for writing `2 * LANES` i16; no alignment is needed.
    unsafe fn store_i16x2(self, p: *mut i16, v: [Self::V; 2]);

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn min_i32(self, a: Self::V, b: Self::V) -> Self::V;
    fn max_i32(self, a: Self::V, b: Self::V) -> Self::V;
    fn and(self, a: Self::V, b: Self::V) -> Self::V;
    fn or(self, a: Self::V, b: Self::V) -> Self::V;
    fn xor(self, a: Self::V, b: Self::V) -> Self::V;
    fn shl<const N: i32>(self, a: Self::V) -> Self::V;
    fn sar<const N: i32>(self, a: Self::V) -> Self::V;
    /// Each lane by as many places as the same lane of `places` says, 0 to 31.
    fn shl_lanes(self, a: Self::V, places: Self::V) -> Self::V;
    /// The largest lane, as i32.
    fn reduce_max_i32(self, a: Self::V) -> i32;
    /// Whether a lane, as i32, is below zero.
    fn any_negative(self, a: Self::V) -> bool;
    /// `v`, which the compiler may neither compute later nor earlier than the other values that pass through here: the
    /// order of the source is the order of the instructions.
    #[inline(always)]
    fn in_order(self, v: Self::V) -> Self::V {
        v
    }

    fn add_f32(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub_f32(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul_f32(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, rounded once.
    fn mul_add_f32(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn div_f32(self, a: Self::V, b: Self::V) -> Self::V;
    /// Neither operand is a NaN; of two zeros either.
    fn min_f32(self, a: Self::V, b: Self::V) -> Self::V;
    /// Neither operand is a NaN; of two zeros either.
    fn max_f32(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a >= b ? v : +0.0`; no NaNs.
    fn keep_if_ge_f32(self, a: Self::V, b: Self::V, v: Self::V) -> Self::V;
    /// f32 to i32, to nearest even; any i32 where it does not fit.
    fn round_to_i32(self, a: Self::V) -> Self::V;
    /// f32 to i32, towards zero; any i32 where it does not fit.
    fn truncate_to_i32(self, a: Self::V) -> Self::V;
    /// i32 to f32, to nearest even.
    fn to_f32(self, a: Self::V) -> Self::V;

    /// Per lane: acc + Σ over its four bytes of unsigned `b` times signed `a`.
    fn dot4(self, acc: Self::V, b: Self::V, a: Self::V) -> Self::V;
    /// [`Simd::dot4`], where no sum of two neighbouring products leaves an i16.
    #[inline(always)]
    fn dot4_small(self, acc: Self::V, b: Self::V, a: Self::V) -> Self::V {
        self.dot4(acc, b, a)
    }
    /// Per 16-bit half: Σ over its two bytes of unsigned `b` times signed `a`, which must fit an i16.
    fn mul_pairs(self, b: Self::V, a: Self::V) -> Self::V;
    /// Per 16-bit half, wrapping.
    fn add_i16(self, a: Self::V, b: Self::V) -> Self::V;
    /// Per 16-bit half: the low half of the product.
    fn mul_i16(self, a: Self::V, b: Self::V) -> Self::V;
    /// Per byte, signed.
    fn min_i8(self, a: Self::V, b: Self::V) -> Self::V;
    /// Per byte, signed.
    fn max_i8(self, a: Self::V, b: Self::V) -> Self::V;
    /// Per byte: −128 stays as it is.
    fn abs_i8(self, a: Self::V) -> Self::V;
    /// Per lane: the sum of its two signed halves.
    fn sum_halves(self, a: Self::V) -> Self::V;

    /// Per lane: Σ over its two signed 16-bit halves of a times b.
    fn mul_halves(self, a: Self::V, b: Self::V) -> Self::V;
    /// Per 16-bit half: the high byte, as an unsigned number.
    fn high_bytes(self, a: Self::V) -> Self::V;

    // A *chunk* is 128 bits of a register, four lanes: the unit in which codes of four lines are laid out.

    /// Every chunk holds the largest lanes (as i32) of the four registers, in order.
    fn max_of_4(self, v: [Self::V; 4]) -> Self::V;
    /// Every chunk holds the sum of all chunks, lane by lane.
    fn sum_chunks(self, v: Self::V) -> Self::V;
    /// The same for 16-bit halves, wrapping.
    fn sum_chunks_i16(self, v: Self::V) -> Self::V;
    /// Lane `I` of every chunk in all lanes of the chunk, 0 ≤ I < 4.
    fn splat_in_chunks<const I: i32>(self, v: Self::V) -> Self::V;
    /// 4 · LANES consecutive i16 in lanes, saturated to bytes, in words of four consecutive ones: with C chunks in a
    /// register, chunk c holds words c, C + c, 2 C + c and 3 C + c.
    fn pack_words(self, v: [Self::V; 4]) -> Self::V;
    /// Per chunk: word j of register i becomes word i of register j.
    fn transpose_words(self, v: [Self::V; 4]) -> [Self::V; 4];
    /// Word w of chunk c becomes lane w · C + c, where a register has C chunks.
    fn unzip_words(self, v: Self::V) -> Self::V;
    /// The chunks of even number of a, then of b; those of odd number of a, then of b.
    fn unzip_chunks(self, a: Self::V, b: Self::V) -> [Self::V; 2];
    /// Per lane: the same lane of four registers, i16 saturated to bytes.
    fn interleave_bytes(self, v: [Self::V; 4]) -> Self::V;
    /// Signed bytes widened to 16 bits: per lane its bytes 0 and 2 in one lane, 1 and 3 in the next; the first two lanes
    /// of each chunk in the first register, the others in the second.
    fn widen_bytes(self, v: Self::V) -> [Self::V; 2];
    /// Chunk c of `v` to the 16 bytes from `p + c * stride` on.
    /// # Safety
    /// All these are valid for writing; no alignment is needed.
    unsafe fn store_chunks(self, p: *mut u8, stride: usize, v: Self::V);
    /// Lane i of `v` in lane i ^ `D`, which is 1, 2 or 4.
    fn exchange<const D: usize>(self, v: Self::V) -> Self::V;
    /// Four words in every chunk.
    /// # Safety
    /// `p` is valid for reading 16 bytes; no alignment is needed.
    unsafe fn load_chunk(self, p: *const i32) -> Self::V;
    /// Chunk 0.
    /// # Safety
    /// `p` is valid for writing 16 bytes; no alignment is needed.
    unsafe fn store_chunk(self, p: *mut u8, v: Self::V);

    /// Per 64-bit lane: the product of the low 32-bit halves.
    fn mul_low_u32(self, a: Self::V, b: Self::V) -> Self::V;
    /// Per 64-bit lane: the high half moved down.
    fn high_u32(self, a: Self::V) -> Self::V;
    /// Philox words 0…3 of `LANES / 2` counters in the low halves of 64-bit lanes, written counter after counter as
    /// eight u16, low half of word 0 first.
    /// # Safety
    /// `p` is valid for writing `4 * LANES` u16; no alignment is needed.
    unsafe fn store_counters(self, p: *mut u16, words: [Self::V; 4]);
    /// The low 16 bits of each 64-bit lane.
    /// # Safety
    /// `p` is valid for writing `LANES / 2` u16; no alignment is needed.
    unsafe fn store_low_halves(self, p: *mut u16, v: Self::V);
}
