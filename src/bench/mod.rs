//! `rvmm compare`: the same image and the same work in every isolation of this host, measured.
//!
//! Everything under test is driven by its public command line, as a user would drive it. A run leaves a result folder
//! ([`results`]); whatever is printed or drawn is a function of what lies in it ([`summary`]). docs/compare.md has the design.

pub mod catalogue;
pub mod compare;
pub mod executor;
pub mod host;
pub mod image;
pub mod interrupt;
pub mod probe;
pub mod process;
pub mod report;
pub mod results;
pub mod run;
pub mod stats;
pub mod summary;
pub mod testing;

pub use results::{Results, Sample};
pub use summary::{Comparison, Summary, Verdict, diff, summarise};
