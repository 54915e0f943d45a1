//! Archives: what `docker save`, `podman save`, skopeo and build tools write, and the folders with the same contents.

mod contents;
mod daemon;
mod docker;
mod load;
mod oci;
mod save;

pub use daemon::{Daemon, import};
pub use load::{load, load_path};
pub use save::{Format, save, save_folder};
