//! Firecracker's static CPU templates: which it would refuse on this host, and with which words.

use serde::Deserialize;

/// Their names on x86-64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum StaticTemplate {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    #[default]
    None,
}

/// Family, model and stepping of a processor, as `/proc/cpuinfo` has them.
type Model = (u32, u32, u32);

const SKYLAKE: Model = (6, 0x55, 4);
const CASCADE_LAKE: Model = (6, 0x55, 7);
const ICE_LAKE: Model = (6, 0x6a, 6);
const MILAN: Model = (25, 1, 1);

impl StaticTemplate {
    /// Whose processors it is for, and which of them.
    fn processors(self) -> Option<(&'static str, &'static [Model])> {
        match self {
            StaticTemplate::C3 | StaticTemplate::T2 => {
                Some(("GenuineIntel", &[SKYLAKE, CASCADE_LAKE, ICE_LAKE]))
            }
            StaticTemplate::T2S => Some(("GenuineIntel", &[SKYLAKE, CASCADE_LAKE])),
            StaticTemplate::T2CL => Some(("GenuineIntel", &[CASCADE_LAKE, ICE_LAKE])),
            StaticTemplate::T2A => Some(("AuthenticAMD", &[MILAN])),
            StaticTemplate::None => None,
        }
    }

    /// Why a VM cannot start with it here, if it cannot.
    pub fn check(self) -> Result<(), String> {
        match self {
            StaticTemplate::None => Ok(()),
            template => {
                let text = std::fs::read_to_string("/proc/cpuinfo")
                    .map_err(|error| format!("Failed to get CPU vendor information: {error}"))?;
                template.check_on(&text)
            }
        }
    }

    /// The same for the host that has this `/proc/cpuinfo`.
    fn check_on(self, cpuinfo: &str) -> Result<(), String> {
        let Some((vendor, models)) = self.processors() else { return Ok(()) };
        let field = |name: &str| {
            let value = |line: &'_ str| {
                let (key, value) = line.split_once(':')?;
                (key.trim_end() == name).then(|| value.trim().to_owned())
            };
            cpuinfo.lines().find_map(value).unwrap_or_default()
        };
        let number = |name| field(name).parse::<u32>().unwrap_or(u32::MAX);
        if field("vendor_id") != vendor {
            return Err("CPU vendor mismatched between actual CPU and CPU template.".into());
        }
        if !models.contains(&(number("cpu family"), number("model"), number("stepping"))) {
            return Err("The current CPU model is not permitted to apply the CPU template.".into());
        }
        Err(format!(
            "the static CPU template {self:?} is not supported by rvmm; put it to /cpu-config as a custom one, or use \
             --cpu baseline"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_refused_as_firecracker_does_and_never_ignored() {
        let host = |vendor: &str, (family, model, stepping): Model| {
            format!(
                "processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n\
                 model name\t: X\nstepping\t: {stepping}\n"
            )
        };
        let (amd, intel) = (host("AuthenticAMD", MILAN), host("GenuineIntel", ICE_LAKE));
        let check = |template: StaticTemplate, host: &str| template.check_on(host).unwrap_err();
        assert!(check(StaticTemplate::T2, &amd).contains("vendor mismatched"));
        assert!(check(StaticTemplate::T2A, &intel).contains("vendor mismatched"));
        assert!(check(StaticTemplate::T2S, &intel).contains("model is not permitted"));
        assert!(check(StaticTemplate::T2A, &host("AuthenticAMD", (26, 17, 0))).contains("not permitted"));
        assert!(check(StaticTemplate::T2A, &amd).contains("not supported by rvmm"));
        assert!(check(StaticTemplate::T2CL, &intel).contains("not supported by rvmm"));
        assert!(check(StaticTemplate::C3, "").contains("vendor mismatched"));
        assert_eq!((StaticTemplate::None.check_on(&amd), StaticTemplate::None.check()), (Ok(()), Ok(())));
    }
}
