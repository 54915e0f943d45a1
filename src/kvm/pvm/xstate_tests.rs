#![allow(unsafe_code)]

use super::*;

#[repr(C, align(64))]
struct Area(Image);

/// A layout with AVX, opmask, both ZMM parts and PKRU, placed as Intel processors place them.
fn layout() -> Layout {
    Layout::new(|subleaf| match subleaf {
        2 => (256, 576, 0),
        5 => (64, 1088, 0),
        6 => (512, 1152, 0),
        7 => (1024, 1664, 0),
        9 => (8, 2688, 0),
        // Supervisor state: not in an image.
        11 => (16, 0, 1),
        // Tiles: outside an image.
        18 => (8192, 2752, 2),
        _ => (0, 0, 0),
    })
}

const ALL: u64 = 0x2e7;

/// An image whose every byte tells its place, with `in_use` components.
fn image(in_use: u64) -> Image {
    let mut image = std::array::from_fn(|index| (index % 251) as u8 + 1);
    image[512..576].fill(0);
    set_u64(&mut image, XSTATE_BV, in_use);
    image[MXCSR..MXCSR + 8].copy_from_slice(&0xffff_0000_1f80_u64.to_le_bytes());
    image[12..16].fill(0);
    image[20..24].fill(0);
    image
}

fn save(form: Save, requested: u64, image: &Image, old: u64) -> (Image, Vec<(usize, usize)>) {
    let mut out = [0; IMAGE_BYTES];
    let parts = layout().save(form, true, requested, image, old, &mut out);
    (out, parts.iter().collect())
}

#[test]
fn layout_knows_what_an_image_holds() {
    assert_eq!(layout().known(), ALL);
    assert_eq!(layout().extent(3, None), 576);
    assert_eq!(layout().extent(ALL, None), 2696);
    assert_eq!(layout().extent(0x207, Some(0x207)), 576 + 256 + 8);
}

#[test]
fn standard_form_writes_everything_requested() {
    let (area, parts) = save(Save::Standard, 7, &image(0), 0x8000);
    assert_eq!(parts, [(0, 24), (32, 160), (24, 32), (160, 416), (576, 832), (512, 520)]);
    assert_eq!(u64_at(&area, XSTATE_BV), 0x8000);
}

#[test]
fn optimized_form_leaves_out_what_is_initial() {
    let (area, parts) = save(Save::Optimized, 7, &image(4), 3);
    assert_eq!(parts, [(24, 32), (576, 832), (512, 520)]);
    assert_eq!(u64_at(&area, XSTATE_BV), 4);
}

#[test]
fn compacted_form_closes_gaps_of_what_was_not_requested() {
    let image = image(0x207);
    let (area, parts) = save(Save::Compacted, 0x227, &image, 0);
    assert_eq!(parts, [(0, 24), (32, 160), (24, 32), (160, 416), (576, 832), (896, 904), (512, 528)]);
    assert_eq!(area[896..904], image[2688..2696]);
    assert_eq!((u64_at(&area, XSTATE_BV), u64_at(&area, XCOMP_BV)), (0x207, 0x227 | COMPACTED));
}

#[test]
fn compacted_form_saves_mxcsr_though_registers_are_initial() {
    let mut image = image(0);
    image[MXCSR] = 0xa0;
    let (area, parts) = save(Save::Compacted, 7, &image, 0);
    assert_eq!(parts, [(24, 32), (160, 416), (512, 528)]);
    assert_eq!(u64_at(&area, XSTATE_BV), 2);
}

#[test]
fn what_is_saved_is_restored() {
    let before = image(ALL);
    for form in [Save::Standard, Save::Optimized, Save::Compacted] {
        let (area, _) = save(form, ALL, &before, 0);
        let xcomp_bv = layout().check_header(&area, ALL, false).unwrap();
        assert_eq!(xcomp_bv.is_some(), form == Save::Compacted);
        let mut after = image(0);
        after[600..2000].fill(0);
        layout().restore(true, ALL, &area, xcomp_bv, &mut after).unwrap();
        for (start, end) in [(0, 416), (512, 520), (576, 832), (1088, 2696)] {
            assert_eq!(after[start..end], before[start..end], "{form:?} {start}..{end}");
        }
    }
}

#[test]
fn restore_of_what_was_not_saved_initializes() {
    let mut state = image(ALL);
    let (area, _) = save(Save::Compacted, 0x2e0, &state, 0);
    let xcomp_bv = layout().check_header(&area, ALL, true).unwrap();
    layout().restore(true, 7, &area, xcomp_bv, &mut state).unwrap();
    assert_eq!(u64_at(&state, XSTATE_BV), ALL & !7);
    assert_eq!((state[0], state[1]), (0x7f, 3));
    assert!(state[160..416].iter().chain(&state[576..832]).all(|byte| *byte == 0));
    assert_eq!(state[1088..2696], image(ALL)[1088..2696]);
    assert_eq!(mxcsr(&state), MXCSR_INIT);
}

#[test]
fn mxcsr_without_registers_keeps_its_value() {
    let mut area = image(0);
    area[MXCSR] = 0xa0;
    let mut state = image(ALL);
    layout().restore(true, 7, &area, None, &mut state).unwrap();
    // KVM would drop MXCSR if nothing that it belongs to were in use.
    assert_eq!((mxcsr(&state), in_use(&state)), (0x1fa0, ALL & !7 | 2));
}

#[test]
fn headers_are_checked() {
    let check = |change: &dyn Fn(&mut Image), compacted| {
        let mut area = image(7);
        change(&mut area);
        layout().check_header(&area, 7, compacted)
    };
    assert_eq!(check(&|_| {}, false), Ok(None));
    assert_eq!(check(&|_| {}, true), Err(Refused));
    assert_eq!(check(&|area| area[512] = 0x27, false), Err(Refused));
    for at in 520..527 {
        assert_eq!(check(&|area| area[at] = 1, false), Err(Refused), "byte {at}");
    }
    for at in 528..536 {
        assert_eq!(check(&|area| area[at] = 1, false), Err(Refused), "byte {at}");
    }
    // The rest of the header is nobody's in the standard form.
    assert_eq!(check(&|area| area[540] = 1, false), Ok(None));
    let compact = |area: &mut Image, bits| set_u64(area, XCOMP_BV, bits | COMPACTED);
    assert_eq!(check(&|area| compact(area, 7), true), Ok(Some(7)));
    assert_eq!(check(&|area| compact(area, 3), false), Err(Refused));
    assert_eq!(check(&|area| compact(area, 0x27), false), Err(Refused));
    for at in 528..576 {
        let change = |area: &mut Image| {
            compact(area, 7);
            area[at] = 1;
        };
        assert_eq!(check(&change, false), Err(Refused), "byte {at}");
    }
}

#[test]
fn reserved_mxcsr_bits_are_refused() {
    let mut state = image(7);
    assert_eq!(set_mxcsr(&mut state, 0x1_0000), Err(Refused));
    assert_eq!(set_mxcsr(&mut state, 0xffff), Ok(()));
    state[MXCSR_MASK..MXCSR_MASK + 4].fill(0);
    assert_eq!(set_mxcsr(&mut state, 0x40), Err(Refused));
}

#[test]
fn zeroing_vectors_keeps_lower_or_no_halves() {
    let mut state = image(ALL);
    layout().zero_vectors(false, &mut state);
    assert_eq!(in_use(&state), ALL & !0x44);
    assert!(state[576..832].iter().chain(&state[1152..1664]).all(|byte| *byte == 0));
    assert_eq!(state[160..416], image(ALL)[160..416]);
    layout().zero_vectors(true, &mut state);
    assert!(state[160..416].iter().all(|byte| *byte == 0));
    assert_eq!(state[1664..2688], image(ALL)[1664..2688]);
}

proptest::proptest! {
    /// No area that a guest can make gets past the checks to a panic, and KVM always gets what it accepts.
    #[test]
    fn any_area_is_refused_or_restored(
        header in proptest::collection::vec(proptest::num::u8::ANY, 64),
        legacy in proptest::collection::vec(proptest::num::u8::ANY, 32),
        sparse: bool,
        requested: u64,
        wide: bool,
    ) {
        let mut area = image(7);
        area[..32].copy_from_slice(&legacy);
        area[512..576].copy_from_slice(&header);
        if sparse {
            area[513..519].fill(0);
            area[521..527].fill(0);
            area[528..576].fill(0);
            area[519] = 0;
            area[527] &= 0x80;
        }
        let requested = requested & ALL;
        if let Ok(xcomp_bv) = layout().check_header(&area, ALL, false) {
            let extent = layout().restored_extent(requested, &area, xcomp_bv);
            proptest::prop_assert!((HEADER_END..=IMAGE_BYTES).contains(&extent));
            let mut state = image(7);
            if layout().restore(wide, requested, &area, xcomp_bv, &mut state).is_ok() {
                proptest::prop_assert_eq!(in_use(&state) & !ALL, 0);
                proptest::prop_assert!(state[520..576].iter().all(|byte| *byte == 0));
                proptest::prop_assert_eq!(mxcsr(&state) & !u32_at(&state, MXCSR_MASK), 0);
            }
        }
    }
}

/// Sets vector registers, then lets the processor save them in all forms.
#[cfg(not(miri))]
fn saved_by_processor() -> Option<(Area, Area, Area)> {
    let (xsavec, avx) = (std::is_x86_feature_detected!("xsavec"), std::is_x86_feature_detected!("avx"));
    if !xsavec || !avx {
        eprintln!("skipped: this processor has no XSAVEC or no AVX");
        return None;
    }
    let values = Area(std::array::from_fn(|index| (index % 253) as u8));
    let mut areas = (Area([0; IMAGE_BYTES]), Area([0; IMAGE_BYTES]), Area([0; IMAGE_BYTES]));
    // SAFETY: the features were detected; all areas are 4096 bytes, aligned to 64, which is enough for x87, SSE and
    // AVX, the components that are asked for; the registers are declared as clobbered.
    unsafe {
        std::arch::asm!(
            "vmovups ymm1, [{values}]",
            "vmovups ymm9, [{values} + 64]",
            "xsave64 [{standard}]",
            "xsavec64 [{compacted}]",
            "xsaveopt64 [{optimized}]",
            values = in(reg) values.0.as_ptr(),
            standard = in(reg) areas.0.0.as_mut_ptr(),
            compacted = in(reg) areas.1.0.as_mut_ptr(),
            optimized = in(reg) areas.2.0.as_mut_ptr(),
            in("eax") 7,
            in("edx") 0,
            out("ymm1") _,
            out("ymm9") _,
        );
    }
    Some(areas)
}

#[cfg(not(miri))]
#[test]
fn processor_and_emulator_save_alike() {
    let Some((standard, compacted, optimized)) = saved_by_processor() else { return };
    let layout = Layout::host();
    for (form, expected) in [(Save::Compacted, &compacted.0), (Save::Optimized, &optimized.0)] {
        let mut out = [0; IMAGE_BYTES];
        let parts = layout.save(form, true, 7, &standard.0, 0, &mut out);
        for (start, end) in parts.iter() {
            assert_eq!(out[start..end], expected[start..end], "{form:?} {start}..{end}");
        }
        assert_eq!(out[512..576], expected[512..576], "{form:?} header");
    }
}
