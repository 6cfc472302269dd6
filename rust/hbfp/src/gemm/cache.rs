//! Sizes of the data caches, as the CPU reports them.

use std::sync::OnceLock;

/// Bytes of the data caches that a core sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caches {
    pub(crate) l1: usize,
    pub(crate) l2: usize,
}

impl Caches {
    /// What small cores have: used where the CPU does not say.
    const DEFAULT: Self = Self { l1: 32 << 10, l2: 512 << 10 };

    /// Asked once.
    pub(crate) fn get() -> Self {
        static CACHES: OnceLock<Caches> = OnceLock::new();
        *CACHES.get_or_init(|| {
            let found = Self::detect();
            // A hypervisor may hide sizes, or report nonsense.
            let within = |x: usize, low: usize, high: usize, default: usize| {
                if (low..=high).contains(&x) { x } else { default }
            };
            Self {
                l1: within(found.l1, 8 << 10, 1 << 20, Self::DEFAULT.l1),
                l2: within(found.l2, 64 << 10, 64 << 20, Self::DEFAULT.l2),
            }
        })
    }

    /// Deterministic cache parameters: leaf 4 (Intel SDM, volume 2, CPUID) and its twin 0x8000_001D (AMD64 APM, volume 3).
    #[cfg(target_arch = "x86_64")]
    fn detect() -> Self {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        let amd = __cpuid(0x8000_0000).eax >= 0x8000_001D && __cpuid(0x8000_0001).ecx & (1 << 22) != 0;
        let leaf = if amd {
            0x8000_001D
        } else if __cpuid(0).eax >= 4 {
            4
        } else {
            return Self { l1: 0, l2: 0 };
        };
        let mut out = Self { l1: 0, l2: 0 };
        for index in 0..16 {
            let r = __cpuid_count(leaf, index);
            let (kind, level) = (r.eax & 31, r.eax >> 5 & 7);
            if kind == 0 {
                break;
            }
            let field = |x: u32, shift: u32, bits: u32| ((x >> shift & ((1 << bits) - 1)) + 1) as usize;
            let bytes =
                field(r.ebx, 22, 10) * field(r.ebx, 12, 10) * field(r.ebx, 0, 12) * (r.ecx as usize).saturating_add(1);
            match (kind, level) {
                (1 | 3, 1) => out.l1 = bytes,
                (1 | 3, 2) => out.l2 = bytes,
                _ => {}
            }
        }
        out
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detect() -> Self {
        Self { l1: 0, l2: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::Caches;

    #[test]
    fn sizes_are_plausible() {
        let Caches { l1, l2 } = Caches::get();
        assert!(l1 >= 8 << 10 && l2 >= l1, "{l1} {l2}");
    }
}
