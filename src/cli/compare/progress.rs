//! How far a comparison has come, on a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::bench::run::Progress;

/// Steps of the bar.
const STEPS: u64 = 1000;

/// A bar with what is measured and the time left; without a terminal, nothing.
pub struct Bar {
    bar: ProgressBar,
}

impl Bar {
    /// Draws on standard error if that is a terminal.
    pub fn new(terminal: bool) -> Bar {
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(STEPS), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3} %  {msg}") {
            bar.set_style(style);
        }
        Bar { bar }
    }

    /// Shows how far it is.
    pub fn show(&mut self, progress: &Progress) {
        self.bar.set_position((progress.done * STEPS as f64) as u64);
        self.bar.set_message(message(progress));
    }

    /// Takes it off the screen.
    pub fn clear(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn message(progress: &Progress) -> String {
    let left = progress.left.map_or(String::new(), |left| format!(", {} left", words(left)));
    format!("{}: {}{left}", progress.probe, progress.executor)
}

fn words(left: Duration) -> String {
    match left.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds => format!("{} min", seconds.div_ceil(60)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_has_the_time_left_when_it_is_known() {
        let mut progress = Progress {
            probe: "start".into(),
            executor: "crun".into(),
            done: 0.5,
            left: Some(Duration::from_secs(150)),
        };
        assert_eq!(message(&progress), "start: crun, 3 min left");
        progress.left = None;
        assert_eq!(message(&progress), "start: crun");
    }
}
