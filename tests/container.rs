//! Containers from the command line: one table of cases in both isolations, their life, networks, and killed programs.

mod cases;
mod faults;
pub mod home;
mod life;
mod network;
mod table;
