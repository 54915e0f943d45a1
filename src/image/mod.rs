//! Images: from a reference to layers that a container can stand on.
//!
//! [`obtain`] finds an image here or fetches it; [`store::Store::hold`] keeps it for a container;
//! [`store::Store::layer_dirs`] and [`store::Store::layer_disks`] give what the two isolations stand on.
//!
//! ```text
//! reference -> registry ─┐
//!              archive  ─┴-> store -> layers -> directories, disks
//! ```

pub mod archive;
mod commit;
pub mod digest;
mod error;
pub mod layers;
pub mod manifest;
mod obtain;
pub mod reference;
pub mod registry;
pub mod store;
#[doc(hidden)]
pub mod testing;
pub mod time;

pub use commit::{Change, Commit, commit};
pub use digest::Digest;
pub use error::Error;
pub use obtain::{PullPolicy, obtain};
pub use reference::Reference;
pub use store::{Image, Store};
