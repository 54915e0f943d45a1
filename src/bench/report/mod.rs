//! What a run found, as text: pure functions of a [`Summary`](super::Summary), without input or output.
//!
//! ```text
//! verdict      who wins in each dimension, by what factor, how sure
//! claims       the 25 claims, each with this host's answer
//! advice       stated needs and measured figures to a recommendation
//! diff         two runs beside each other
//! table, markdown, data (JSON and CSV), html
//! ```
//!
//! Titles, facts and reasons come from results, so from images and programs: every writer escapes them for where they go.
//! docs/reports.md has what the reports hold.

pub mod advice;
pub mod claims;
mod data;
mod diff;
pub mod format;
mod html;
mod markdown;
mod table;
pub mod verdict;

pub use advice::{Advice, Needs, advice, advice_text};
pub use claims::{Claim, claims};
pub use data::{csv, json};
pub use diff::diff;
pub use html::html;
pub use markdown::markdown;
pub use table::table;

#[cfg(test)]
mod tests;
