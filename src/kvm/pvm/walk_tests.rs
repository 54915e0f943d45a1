use super::*;
use crate::memory;
use vm_memory::Bytes;

const ROOT: u64 = 0x1000;
const LEVEL3: u64 = 0x2000;
const LEVEL2: u64 = 0x3000;
const LEVEL1: u64 = 0x4000;
const PAGE: u64 = 0x9000;
const ADDRESS_MAPPED: u64 = 0x0000_1234_5678_9abc;

const ALL: u64 = PRESENT | WRITABLE | USER;

struct Tables {
    ram: Ram,
    sregs: kvm_sregs,
    regs: kvm_regs,
    user: bool,
}

impl Tables {
    /// Four levels that map one page, every right given.
    fn new() -> Tables {
        let sregs =
            kvm_sregs { cr0: CR0_PG | CR0_WP, cr3: ROOT, efer: EFER_LMA | EFER_NXE, ..Default::default() };
        let tables =
            Tables { ram: memory::allocate(1 << 20).unwrap(), sregs, regs: kvm_regs::default(), user: false };
        tables.link(4, LEVEL3 | ALL);
        tables.link(3, LEVEL2 | ALL);
        tables.link(2, LEVEL1 | ALL);
        tables.link(1, PAGE | ALL);
        tables
    }

    fn place(level: u32) -> u64 {
        let table = [0, LEVEL1, LEVEL2, LEVEL3, ROOT][level as usize];
        table + (ADDRESS_MAPPED >> (12 + 9 * (level - 1)) & 0x1ff) * 8
    }

    fn link(&self, level: u32, entry: u64) {
        self.ram.write_obj(entry, GuestAddress(Self::place(level))).unwrap();
    }

    fn entry(&self, level: u32) -> u64 {
        self.ram.read_obj(GuestAddress(Self::place(level))).unwrap()
    }

    fn paging(&self) -> Paging {
        Paging::new(&self.regs, &self.sregs, self.user, 40)
    }

    fn translate(&self, access: Access) -> Result<u64, Miss> {
        self.paging().translate(&self.ram, ADDRESS_MAPPED, access)
    }
}

#[test]
fn page_is_found_and_marked_accessed() {
    let tables = Tables::new();
    assert_eq!(tables.translate(Access::Read), Ok(PAGE | 0xabc));
    for level in 1..=4 {
        assert_eq!(tables.entry(level) & (ACCESSED | DIRTY), ACCESSED, "level {level}");
    }
}

#[test]
fn write_marks_the_leaf_dirty() {
    let tables = Tables::new();
    assert_eq!(tables.translate(Access::Write), Ok(PAGE | 0xabc));
    assert_eq!(tables.entry(1) & DIRTY, DIRTY);
    assert_eq!(tables.entry(2) & DIRTY, 0);
}

#[test]
fn refused_access_marks_nothing() {
    let tables = Tables::new();
    tables.link(1, PAGE | PRESENT);
    assert_eq!(tables.translate(Access::Write), Err(Miss::Fault(3)));
    assert!((1..=4).all(|level| tables.entry(level) & ACCESSED == 0));
}

#[test]
fn missing_entry_at_any_level_is_not_present() {
    for level in 1..=4 {
        let mut tables = Tables::new();
        tables.link(level, 0);
        assert_eq!(tables.translate(Access::Read), Err(Miss::Fault(0)));
        assert_eq!(tables.translate(Access::Write), Err(Miss::Fault(2)));
        tables.user = true;
        assert_eq!(tables.translate(Access::Write), Err(Miss::Fault(6)));
    }
}

#[test]
fn right_taken_away_at_any_level_counts() {
    for level in 1..=4 {
        let mut tables = Tables::new();
        let entry = tables.entry(level);
        tables.link(level, entry & !USER);
        assert!(tables.translate(Access::Write).is_ok());
        tables.user = true;
        assert_eq!(tables.translate(Access::Read), Err(Miss::Fault(5)));
        tables.link(level, entry & !WRITABLE);
        assert!(tables.translate(Access::Read).is_ok());
        assert_eq!(tables.translate(Access::Write), Err(Miss::Fault(7)));
    }
}

#[test]
fn supervisor_ignores_read_only_without_write_protection() {
    let mut tables = Tables::new();
    tables.link(1, PAGE | PRESENT);
    tables.sregs.cr0 &= !CR0_WP;
    assert!(tables.translate(Access::Write).is_ok());
    tables.link(1, PAGE | PRESENT | USER);
    tables.user = true;
    assert_eq!(tables.translate(Access::Write), Err(Miss::Fault(7)));
}

#[test]
fn smap_forbids_user_pages_unless_ac_is_set() {
    let mut tables = Tables::new();
    tables.sregs.cr4 = CR4_SMAP;
    assert_eq!(tables.translate(Access::Read), Err(Miss::Fault(1)));
    tables.regs.rflags = RFLAGS_AC;
    assert!(tables.translate(Access::Read).is_ok());
    tables.regs.rflags = 0;
    tables.user = true;
    assert!(tables.translate(Access::Read).is_ok());
}

#[test]
fn large_pages_end_the_walk() {
    let tables = Tables::new();
    tables.link(2, 0x0060_0000 | ALL | LARGE);
    assert_eq!(tables.translate(Access::Read), Ok(0x0060_0000 | ADDRESS_MAPPED & 0x1f_ffff));
    tables.link(3, 0x4000_0000 | ALL | LARGE);
    assert_eq!(tables.translate(Access::Read), Ok(0x4000_0000 | ADDRESS_MAPPED & 0x3fff_ffff));
    // Bit 12 is PAT; the bits above it, up to the page's address, are reserved.
    tables.link(3, 0x4000_0000 | ALL | LARGE | 1 << 12);
    assert!(tables.translate(Access::Read).is_ok());
    tables.link(3, 0x4000_0000 | ALL | LARGE | 1 << 13);
    assert_eq!(tables.translate(Access::Read), Err(Miss::Fault(9)));
}

#[test]
fn reserved_bits_fault() {
    for (level, bits) in [(4, LARGE), (1, 1 << 40), (2, 1 << 51), (3, 1 << 45)] {
        let tables = Tables::new();
        tables.link(level, tables.entry(level) | bits);
        assert_eq!(tables.translate(Access::Read), Err(Miss::Fault(9)), "level {level}");
    }
    let mut tables = Tables::new();
    tables.link(1, PAGE | ALL | NO_EXECUTE);
    assert!(tables.translate(Access::Read).is_ok());
    tables.sregs.efer = EFER_LMA;
    assert_eq!(tables.translate(Access::Write), Err(Miss::Fault(11)));
}

#[test]
fn five_levels_are_walked() {
    let mut tables = Tables::new();
    tables.sregs.cr4 = CR4_LA57;
    tables.sregs.cr3 = 0x7000;
    let address = ADDRESS_MAPPED | 0x5a << 48;
    tables.ram.write_obj(ROOT | ALL, GuestAddress(0x7000 + 0x5a * 8)).unwrap();
    let paging = tables.paging();
    assert!(paging.is_canonical(address));
    assert_eq!(paging.translate(&tables.ram, address, Access::Read), Ok(PAGE | 0xabc));
    assert_eq!(paging.translate(&tables.ram, ADDRESS_MAPPED, Access::Read), Err(Miss::Fault(0)));
}

#[test]
fn canonical_addresses_are_sign_extended() {
    let paging = Tables::new().paging();
    for (address, canonical) in [
        (0, true),
        (0x7fff_ffff_ffff, true),
        (0x8000_0000_0000, false),
        (0xffff_7fff_ffff_ffff, false),
        (0xffff_8000_0000_0000, true),
        (u64::MAX, true),
    ] {
        assert_eq!(paging.is_canonical(address), canonical, "{address:#x}");
    }
}

#[test]
fn tables_outside_memory_are_told_apart_from_faults() {
    let tables = Tables::new();
    tables.link(3, 0x8_0000_0000 | ALL);
    assert!(
        matches!(tables.translate(Access::Read), Err(Miss::NotMemory(address)) if address >= 0x8_0000_0000)
    );
}

#[test]
fn without_paging_addresses_are_physical() {
    let mut tables = Tables::new();
    tables.sregs.cr0 = 0;
    assert_eq!(tables.translate(Access::Write), Ok(ADDRESS_MAPPED));
    tables.sregs.cr0 = CR0_PG;
    tables.sregs.efer = 0;
    assert_eq!(tables.translate(Access::Write), Err(Miss::UnsupportedMode));
}

proptest::proptest! {
    /// Whatever the tables hold, a walk ends, and only with addresses that the guest could have meant.
    #[test]
    fn any_tables_are_survived(words: Vec<u64>, address: u64, cr0: u64, cr3: u64, cr4: u64, efer: u64, user: bool) {
        let ram = memory::allocate(1 << 16).unwrap();
        for (index, word) in words.iter().enumerate() {
            let _ = ram.write_obj(*word & !(0x000f_ffff_fff0_0000), GuestAddress(index as u64 * 8));
        }
        let sregs = kvm_sregs { cr0, cr3: cr3 & 0xffff, cr4, efer, ..Default::default() };
        let paging = Paging::new(&kvm_regs::default(), &sregs, user, 40);
        if let Ok(physical) = paging.translate(&ram, address, Access::Write) {
            proptest::prop_assert_eq!(physical & 0xfff, address & 0xfff);
        }
    }
}
