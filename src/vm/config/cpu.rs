//! What the guest sees of the processor: all that KVM can show, a common subset, or what a template says.
//!
//! A template has Firecracker's format: `{"cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers":
//! [{"register": "ecx", "bitmap": "0bxxx0…"}]}], "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b…"}]}`. A bitmap has one
//! character for each bit, the highest first: `0` and `1` set it, `x` leaves it; what is missing in front is left.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bits that are set, cleared or left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bitmap {
    /// Bits that are changed.
    pub mask: u64,
    /// What they become.
    pub value: u64,
}

impl Bitmap {
    /// The bits after the change.
    pub fn apply(self, to: u64) -> u64 {
        (to & !self.mask) | self.value
    }
}

impl FromStr for Bitmap {
    type Err = String;

    fn from_str(text: &str) -> Result<Bitmap, String> {
        let wrong = || format!("{text:?} is no bitmap: 0b and up to 64 of 0, 1 and x");
        let digits = text.strip_prefix("0b").ok_or_else(wrong)?;
        let mut bitmap = Bitmap::default();
        let mut count = 0;
        for digit in digits.chars().filter(|digit| *digit != '_') {
            let (mask, value) = match digit {
                '0' => (1, 0),
                '1' => (1, 1),
                'x' => (0, 0),
                _ => return Err(wrong()),
            };
            bitmap = Bitmap { mask: bitmap.mask << 1 | mask, value: bitmap.value << 1 | value };
            count += 1;
            if count > 64 {
                return Err(wrong());
            }
        }
        if count == 0 { Err(wrong()) } else { Ok(bitmap) }
    }
}

impl fmt::Display for Bitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("0b")?;
        let len = if self.mask >> 32 == 0 { 32 } else { 64 };
        (0..len).rev().try_for_each(|bit| {
            f.write_str(match (self.mask >> bit & 1, self.value >> bit & 1) {
                (0, _) => "x",
                (_, 0) => "0",
                _ => "1",
            })
        })
    }
}

/// Serializes by text.
macro_rules! by_text {
    ($name:ty) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

by_text!(Bitmap);

/// A number that is written `0x1a`, `0b11` or `26`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Number(pub u32);

impl FromStr for Number {
    type Err = String;

    fn from_str(text: &str) -> Result<Number, String> {
        let (digits, radix) = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
            (Some(digits), _) => (digits, 16),
            (_, Some(digits)) => (digits, 2),
            _ => (text, 10),
        };
        u32::from_str_radix(digits, radix)
            .map(Number)
            .map_err(|_| format!("{text:?} is no number of 32 bits"))
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

by_text!(Number);

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A change of a register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    /// Which.
    pub register: Register,
    /// How.
    pub bitmap: Bitmap,
}

/// A change of a CPUID leaf that KVM shows; one that it does not show stays hidden.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// The leaf.
    pub leaf: Number,
    /// The subleaf.
    pub subleaf: Number,
    /// KVM's flags of the entry; not looked at.
    #[serde(default)]
    pub flags: u32,
    /// What changes.
    pub modifiers: Vec<RegisterModifier>,
}

/// A change of a model-specific register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Its number.
    pub addr: Number,
    /// How.
    pub bitmap: Bitmap,
}

/// A template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpuTemplate {
    /// KVM capabilities to check or not to check; rvmm has a list of its own, so this is read and not used.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kvm_capabilities: Vec<String>,
    /// Changes of CPUID.
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes of MSRs.
    pub msr_modifiers: Vec<MsrModifier>,
}

/// What the guest sees of the processor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cpu {
    /// All that KVM can show.
    #[default]
    Host,
    /// What processors of the last 15 years have in common (x86-64-v2), so that guests look the same everywhere.
    Baseline,
    /// What a template says.
    Template(Box<CpuTemplate>),
}

impl Cpu {
    /// `host`, `baseline`, or a file with a template.
    pub fn read(text: &str) -> Result<Cpu, String> {
        match text {
            "host" => Ok(Cpu::Host),
            "baseline" => Ok(Cpu::Baseline),
            path => {
                let bytes = std::fs::read(Path::new(path))
                    .map_err(|error| format!("cannot read the CPU template {path:?}: {error}"))?;
                let template = serde_json::from_slice(&bytes)
                    .map_err(|error| format!("the CPU template {path:?} is wrong: {error}"))?;
                Ok(Cpu::Template(Box::new(template)))
            }
        }
    }

    /// The changes that it comes to.
    pub fn template(&self) -> CpuTemplate {
        match self {
            Cpu::Host => CpuTemplate::default(),
            Cpu::Baseline => baseline(),
            Cpu::Template(template) => (**template).clone(),
        }
    }
}

/// The features of x86-64-v2 and what kernels need to protect themselves; no AVX and what builds on it.
fn baseline() -> CpuTemplate {
    let keep = |leaf, subleaf, register, kept: u32| CpuidModifier {
        leaf: Number(leaf),
        subleaf: Number(subleaf),
        flags: 0,
        modifiers: vec![RegisterModifier { register, bitmap: Bitmap { mask: (!kept).into(), value: 0 } }],
    };
    // Intel SDM volume 2, CPUID. FMA, MOVBE, F16C, AVX, RDRAND.
    let leaf_1_ecx = !(1 << 12 | 1 << 22 | 1 << 28 | 1 << 29 | 1 << 30);
    // FSGSBASE, SMEP, ERMS, INVPCID, SMAP, CLFLUSHOPT, CLWB.
    let leaf_7_ebx = 1 | 1 << 7 | 1 << 9 | 1 << 10 | 1 << 20 | 1 << 23 | 1 << 24;
    // UMIP, PKU and OSPKE stay hidden with the state that they need.
    let leaf_7_ecx = 1 << 2;
    // MD_CLEAR, IBRS, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD: protection, not speed.
    let leaf_7_edx = 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31;
    CpuTemplate {
        cpuid_modifiers: vec![
            keep(1, 0, Register::Ecx, leaf_1_ecx),
            keep(7, 0, Register::Ebx, leaf_7_ebx),
            keep(7, 0, Register::Ecx, leaf_7_ecx),
            keep(7, 0, Register::Edx, leaf_7_edx),
            keep(7, 1, Register::Eax, 0),
            // x87 and SSE.
            keep(0xd, 0, Register::Eax, 3),
        ],
        ..CpuTemplate::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_set_clear_and_leave() {
        let bitmap: Bitmap = "0bx01x".parse().unwrap();
        assert_eq!(bitmap.apply(0b1101), 0b1011);
        assert_eq!(bitmap.apply(!0) & 0xf, 0b1011);
        assert_eq!(bitmap.to_string().parse(), Ok(bitmap));
        for wrong in ["", "0b", "01", "0b2", &format!("0b{}", "x".repeat(65))] {
            assert!(wrong.parse::<Bitmap>().is_err(), "{wrong}");
        }
        assert_eq!("0x1A".parse::<Number>().map(|number| number.0), Ok(26));
        assert!("0x1ffffffff".parse::<Number>().is_err());
    }

    #[test]
    fn firecrackers_templates_are_read() {
        let text = r#"{"cpuid_modifiers":[{"leaf":"0x7","subleaf":"0x0","flags":1,"modifiers":[
            {"register":"ebx","bitmap":"0bxxxxxxxxxxxxxxxxxxxxxxxxxx0xxxxx"}]}],
            "msr_modifiers":[{"addr":"0x10a","bitmap":"0b0001"}]}"#;
        let template: CpuTemplate = serde_json::from_str(text).unwrap();
        assert_eq!(template.cpuid_modifiers[0].modifiers[0].bitmap.apply(0xff), 0xdf);
        assert_eq!(template.msr_modifiers[0].addr, Number(0x10a));
        let again: CpuTemplate = serde_json::from_str(&serde_json::to_string(&template).unwrap()).unwrap();
        assert_eq!(again, template);
        assert!(serde_json::from_str::<CpuTemplate>(r#"{"cpuid":[]}"#).is_err());
    }
}
