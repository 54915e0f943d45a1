//! The layout of the XSAVE area (Intel SDM volume 1, chapter 13): pure functions over byte arrays.
//!
//! An [`Image`] is what `KVM_GET_XSAVE` gives and `KVM_SET_XSAVE` takes: the standard form, with every component
//! present, components in their initial state included.

/// Bytes of an [`Image`], as of `struct kvm_xsave`.
pub const IMAGE_BYTES: usize = 4096;
/// The vector state of a vCPU in KVM's form.
pub type Image = [u8; IMAGE_BYTES];

/// Legacy region and header, the least that every form of the instructions touches.
pub const HEADER_END: usize = 576;

const XSTATE_BV: usize = 512;
const XCOMP_BV: usize = 520;
/// Bit 63 of XCOMP_BV: the area is compacted.
const COMPACTED: u64 = 1 << 63;

const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
/// Upper halves of ZMM0-15.
const ZMM_HIGH: u64 = 1 << 6;

const FPU_CONTROL_INIT: u16 = 0x37f;
const MXCSR: usize = 24;
const MXCSR_MASK: usize = 28;
const MXCSR_INIT: u32 = 0x1f80;
/// What MXCSR allows where the processor reports no mask (SDM volume 1, §11.6.6).
const MXCSR_MASK_DEFAULT: u32 = 0xffbf;

/// Highest component number, plus one, that a [`Layout`] knows.
const COMPONENTS: usize = 32;

/// One component from number 2 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Component {
    /// Place in the standard form.
    offset: usize,
    size: usize,
    /// In the compacted form the component starts at a multiple of 64.
    aligned: bool,
}

/// Places and sizes of the components of one processor.
#[derive(Clone, Debug)]
pub struct Layout {
    components: [Option<Component>; COMPONENTS],
}

/// A value that a restore instruction refuses with a general protection fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// How an instruction saves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Save {
    /// XSAVE.
    Standard,
    /// XSAVEOPT: standard form, components in their initial state are not written.
    Optimized,
    /// XSAVEC and XSAVES.
    Compacted,
}

/// The parts of a save area that a save instruction writes.
#[derive(Clone, Debug)]
pub struct Parts {
    ranges: [(usize, usize); COMPONENTS + 4],
    len: usize,
}

impl Parts {
    fn push(&mut self, start: usize, end: usize) {
        if let Some(slot) = self.ranges.get_mut(self.len) {
            *slot = (start, end);
            self.len += 1;
        }
    }

    /// Start and end of every part.
    pub fn iter(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.ranges.iter().take(self.len).copied()
    }
}

impl Layout {
    /// Reads the layout through `leaf`, which gives EAX, EBX, ECX of CPUID leaf 0xD for a subleaf.
    pub fn new(leaf: impl Fn(u32) -> (u32, u32, u32)) -> Layout {
        let mut components = [None; COMPONENTS];
        for (number, component) in (0_u32..).zip(&mut components).skip(2) {
            let (size, offset, flags) = leaf(number);
            let (size, offset) = (size as usize, offset as usize);
            let is_user_state = flags & 1 == 0;
            if size > 0 && is_user_state && offset >= HEADER_END && offset + size <= IMAGE_BYTES {
                *component = Some(Component { offset, size, aligned: flags & 2 != 0 });
            }
        }
        Layout { components }
    }

    /// The layout of the processor that this runs on, which is the one that guests on PVM hosts see.
    pub fn host() -> Layout {
        Layout::new(|subleaf| {
            let leaf = std::arch::x86_64::__cpuid_count(0xd, subleaf);
            (leaf.eax, leaf.ebx, leaf.ecx)
        })
    }

    /// The components that an [`Image`] holds.
    pub fn known(&self) -> u64 {
        let numbered = (0..).zip(&self.components).filter(|(_, component)| component.is_some());
        numbered.fold(X87 | SSE, |mask, (number, _): (u32, _)| mask | 1 << number)
    }

    /// The components of `mask` from number 2 on, with where they lie: in the standard form, or in the form
    /// compacted by `xcomp_bv`.
    fn places(&self, mask: u64, xcomp_bv: Option<u64>) -> impl Iterator<Item = (u64, Component, usize)> + '_ {
        let mut next = HEADER_END;
        let numbered = (0_u32..).zip(&self.components);
        numbered.filter_map(move |(number, component)| {
            let (bit, component) = (1_u64 << number, (*component)?);
            let place = match xcomp_bv {
                None => component.offset,
                Some(xcomp_bv) if xcomp_bv & bit == 0 => return None,
                Some(_) => {
                    let start = if component.aligned { next.next_multiple_of(64) } else { next };
                    next = start + component.size;
                    start
                }
            };
            (mask & bit != 0).then_some((bit, component, place))
        })
    }

    /// Bytes from the start of an area to the end of the last component of `mask`.
    pub fn extent(&self, mask: u64, xcomp_bv: Option<u64>) -> usize {
        self.places(mask, xcomp_bv)
            .fold(HEADER_END, |end, (_, component, place)| end.max(place + component.size))
    }

    /// Builds in `out` what a save instruction stores. `requested` is the requested-feature bitmap, already masked
    /// with XCR0; `wide` says that the instruction has REX.W; `old_xstate_bv` is XSTATE_BV as the area holds it.
    pub fn save(
        &self,
        form: Save,
        wide: bool,
        requested: u64,
        image: &Image,
        old_xstate_bv: u64,
        out: &mut Image,
    ) -> Parts {
        let mut parts = Parts { ranges: [(0, 0); COMPONENTS + 4], len: 0 };
        let compacted = form == Save::Compacted;
        let mut in_use = u64_at(image, XSTATE_BV);
        if compacted && requested & SSE != 0 && u32_at(image, MXCSR) != MXCSR_INIT {
            in_use |= SSE;
        }
        let stored = if form == Save::Standard { requested } else { requested & in_use };
        let mut copy = |from: usize, to: usize, len: usize| {
            out[to..to + len].copy_from_slice(&image[from..from + len]);
            parts.push(to, to + len);
        };
        if stored & X87 != 0 {
            copy(0, 0, MXCSR);
            copy(32, 32, 128);
        }
        let stores_mxcsr = if compacted { stored & SSE } else { requested & (SSE | AVX) };
        if stores_mxcsr != 0 {
            copy(MXCSR, MXCSR, 8);
        }
        if stored & SSE != 0 {
            copy(160, 160, 256);
        }
        for (_, component, place) in self.places(stored, compacted.then_some(requested)) {
            copy(component.offset, place, component.size);
        }
        if stored & X87 != 0 && !wide {
            clear_selectors(out);
        }
        if compacted {
            set_u64(out, XSTATE_BV, stored);
            set_u64(out, XCOMP_BV, requested | COMPACTED);
            parts.push(XSTATE_BV, XCOMP_BV + 8);
        } else {
            set_u64(out, XSTATE_BV, old_xstate_bv & !requested | in_use & requested);
            parts.push(XSTATE_BV, XCOMP_BV);
        }
        parts
    }

    /// Checks the header of an area that is to be restored, and gives the form of it: the value of XCOMP_BV if it is
    /// compacted. `must_be_compacted` is so for XRSTORS.
    pub fn check_header(
        &self,
        area: &Image,
        xcr0: u64,
        must_be_compacted: bool,
    ) -> Result<Option<u64>, Refused> {
        let (xstate_bv, xcomp_bv) = (u64_at(area, XSTATE_BV), u64_at(area, XCOMP_BV));
        let is_zero = |range: std::ops::Range<usize>| area[range].iter().all(|byte| *byte == 0);
        if xcomp_bv & COMPACTED == 0 {
            let sound = !must_be_compacted && xcomp_bv == 0 && is_zero(528..536) && xstate_bv & !xcr0 == 0;
            return if sound { Ok(None) } else { Err(Refused) };
        }
        let saved = xcomp_bv & !COMPACTED;
        let sound = saved & !xcr0 == 0 && xstate_bv & !saved == 0 && is_zero(528..576);
        if sound { Ok(Some(saved)) } else { Err(Refused) }
    }

    /// Bytes of an area that a restore reads, its header having been checked.
    pub fn restored_extent(&self, requested: u64, area: &Image, xcomp_bv: Option<u64>) -> usize {
        self.extent(requested & u64_at(area, XSTATE_BV), xcomp_bv)
    }

    /// Changes `image` as a restore instruction changes the registers. `area` must have passed
    /// [`Layout::check_header`], which gave `xcomp_bv`.
    pub fn restore(
        &self,
        wide: bool,
        requested: u64,
        area: &Image,
        xcomp_bv: Option<u64>,
        image: &mut Image,
    ) -> Result<(), Refused> {
        let saved = u64_at(area, XSTATE_BV);
        let loaded = requested & saved;
        let mxcsr = match xcomp_bv {
            None if requested & (SSE | AVX) != 0 => Some(u32_at(area, MXCSR)),
            Some(_) if loaded & SSE != 0 => Some(u32_at(area, MXCSR)),
            Some(_) if requested & SSE != 0 => Some(MXCSR_INIT),
            _ => None,
        };
        if let Some(mxcsr) = mxcsr {
            set_mxcsr(image, mxcsr)?;
        }
        if loaded & X87 != 0 {
            image[..MXCSR].copy_from_slice(&area[..MXCSR]);
            image[32..160].copy_from_slice(&area[32..160]);
            if !wide {
                clear_selectors(image);
            }
        } else if requested & X87 != 0 {
            image[..MXCSR].fill(0);
            image[..2].copy_from_slice(&FPU_CONTROL_INIT.to_le_bytes());
            image[32..160].fill(0);
        }
        if loaded & SSE != 0 {
            image[160..416].copy_from_slice(&area[160..416]);
        } else if requested & SSE != 0 {
            image[160..416].fill(0);
        }
        for (_, component, _) in self.places(requested & !saved, None) {
            image[component.offset..component.offset + component.size].fill(0);
        }
        for (_, component, place) in self.places(loaded, xcomp_bv) {
            let Some(bytes) = area.get(place..place + component.size) else { return Err(Refused) };
            image[component.offset..component.offset + component.size].copy_from_slice(bytes);
        }
        let in_use = u64_at(image, XSTATE_BV) & !requested | loaded;
        set_u64(image, XSTATE_BV, in_use);
        normalize(image);
        Ok(())
    }

    /// VZEROUPPER and VZEROALL.
    pub fn zero_vectors(&self, whole: bool, image: &mut Image) {
        let mut cleared = AVX | ZMM_HIGH;
        if whole {
            image[160..416].fill(0);
            cleared |= SSE;
        }
        for (_, component, _) in self.places(cleared, None) {
            image[component.offset..component.offset + component.size].fill(0);
        }
        let in_use = u64_at(image, XSTATE_BV) & !cleared;
        set_u64(image, XSTATE_BV, in_use);
        normalize(image);
    }
}

/// XSTATE_BV of an area: the components that are not in their initial state.
pub fn in_use(area: &Image) -> u64 {
    u64_at(area, XSTATE_BV)
}

/// The x87 status word.
pub fn fpu_status(image: &Image) -> u16 {
    u16::from_le_bytes([image[2], image[3]])
}

/// FNCLEX: clears the exception flags, the summary and the busy bit of the status word.
pub fn clear_fpu_exceptions(image: &mut Image) {
    let status = fpu_status(image) & !0x80ff;
    image[2..4].copy_from_slice(&status.to_le_bytes());
}

/// MXCSR.
pub fn mxcsr(image: &Image) -> u32 {
    u32_at(image, MXCSR)
}

/// Sets MXCSR, unless reserved bits are set.
pub fn set_mxcsr(image: &mut Image, value: u32) -> Result<(), Refused> {
    let mask = match u32_at(image, MXCSR_MASK) {
        0 => MXCSR_MASK_DEFAULT,
        mask => mask,
    };
    if value & !mask != 0 {
        return Err(Refused);
    }
    image[MXCSR..MXCSR_MASK].copy_from_slice(&value.to_le_bytes());
    normalize(image);
    Ok(())
}

/// KVM takes MXCSR from an image only where SSE or AVX is in use.
fn normalize(image: &mut Image) {
    let in_use = u64_at(image, XSTATE_BV);
    if u32_at(image, MXCSR) != MXCSR_INIT && in_use & (SSE | AVX) == 0 {
        set_u64(image, XSTATE_BV, in_use | SSE);
    }
    set_u64(image, XCOMP_BV, 0);
}

/// Forms without REX.W hold 32-bit instruction and data pointers, and selectors that 64-bit code does not have.
fn clear_selectors(area: &mut Image) {
    area[12..16].fill(0);
    area[20..24].fill(0);
}

fn u64_at(area: &Image, at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&area[at..at + 8]);
    u64::from_le_bytes(bytes)
}

fn u32_at(area: &Image, at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&area[at..at + 4]);
    u32::from_le_bytes(bytes)
}

fn set_u64(area: &mut Image, at: usize, value: u64) {
    area[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
#[path = "xstate_tests.rs"]
mod tests;
