//! Containers from the command line: one table of cases in both isolations, their life, networks, and killed programs.

mod cases;
mod faults;
pub mod home;
mod layers;
mod life;
mod many;
pub mod network;
mod peers;
mod random_faults;
mod table;
mod terminal;
mod walls;
