//! Images: from a reference to layers that a container can stand on.

pub mod digest;
pub mod layers;
pub mod reference;
