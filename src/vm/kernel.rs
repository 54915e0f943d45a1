//! Which guest kernel a host needs, and where it is.

use std::path::{Path, PathBuf};

use crate::kvm::kind::Kind;
use crate::program;

/// File name of the kernel that suits a kind of KVM.
pub fn file_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Pvm => "vmlinux-pvm",
        _ => "vmlinux",
    }
}

/// Where guest kernels are looked for, in order: beside a build tree's binary, below the current directory, then
/// where packages and `make install` put them.
pub fn directories() -> Vec<PathBuf> {
    let built = program::directory().ok().and_then(|directory| Some(directory.parent()?.join("guest")));
    let fixed = ["target/guest", "/usr/local/share/rvmm", "/usr/share/rvmm"].map(PathBuf::from);
    built.into_iter().chain(fixed).collect()
}

/// The kernel for a kind of KVM, if there is one.
pub fn find(kind: Kind) -> Option<PathBuf> {
    let name = Path::new(file_name(kind));
    directories().iter().map(|directory| directory.join(name)).find(|path| path.is_file())
}
