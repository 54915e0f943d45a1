//! An image's users and groups, and a user's filter, of any contents: read or refused, and what is read can be used.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rvmm::container::spec::{CapabilitySet, Profile, Users, compile_seccomp};

fuzz_target!(|input: (&[u8], &[u8], &str, &[u8])| {
    let (passwd, group, user, profile) = input;
    if let Ok(identity) = Users::parse(passwd, group).resolve(user, &[user.to_owned()]) {
        assert!(identity.uid <= i32::MAX as u32 && identity.groups.first() == Some(&identity.gid));
    }
    if let Ok(profile) = Profile::parse(profile)
        && let Ok(seccomp) = profile.apply(CapabilitySet::all(), (6, 1))
        && let Ok(program) = compile_seccomp(&seccomp)
    {
        assert!(program.len() % 8 == 0 && program.len() <= 4096 * 8);
    }
});
