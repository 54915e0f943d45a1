//! Images: from a reference to layers that a container can stand on.
