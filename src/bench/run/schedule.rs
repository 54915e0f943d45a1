//! How many samples each executor may take of each probe, where time is short.
//!
//! Time is given away in steps: to one sample, to two, six, ten and twenty. One sample says how much it is; two beside twenty can show
//! that one executor is slower; six have an interval of their own. The step that gives most for its time comes first. So what is fast
//! gets samples enough to say something, and what is slow shares the rest instead of holding everything up.

/// The numbers of samples at which more becomes possible, and what it is worth to get there from the number before.
const STEPS: [(u32, f64); 5] = [(1, 10.0), (2, 4.0), (6, 6.0), (10, 1.0), (20, 1.0)];

/// One executor in one probe.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cell {
    /// Seconds that a sample takes, as far as is known.
    pub cost: f64,
    /// How much its samples are worth, beside others that have 1.
    pub weight: f64,
    /// Samples that it has.
    pub taken: u32,
    /// Samples at most.
    pub most: u32,
}

/// How many samples each is to have in all, so that what is still to be taken fits into `seconds`. None for what does not fit.
pub fn allocate(cells: &[Cell], seconds: f64) -> Vec<u32> {
    let mut targets: Vec<u32> = cells.iter().map(|cell| cell.taken.min(cell.most)).collect();
    let mut left = seconds;
    let mut open: Vec<bool> = cells.iter().map(|cell| cell.taken < cell.most).collect();
    let next = |target: u32, most: u32| {
        let step = STEPS.into_iter().find(|(step, _)| *step > target);
        let (step, worth) = step.unwrap_or((target.saturating_add(10), 1.0));
        (step.min(most), worth)
    };
    loop {
        let steps = cells.iter().zip(&targets).enumerate().filter(|(index, _)| open[*index]);
        let best = steps
            .map(|(index, (cell, target))| {
                let (to, worth) = next(*target, cell.most);
                let price = cell.cost.max(0.0) * f64::from(to - target);
                (index, to, price, price / (worth * cell.weight).max(1e-9))
            })
            .min_by(|(.., a), (.., b)| a.total_cmp(b));
        let Some((index, to, price, _)) = best else { break };
        if price <= left {
            left -= price;
            targets[index] = to;
            open[index] = to < cells[index].most;
        } else {
            open[index] = false;
        }
    }
    // What no step fits into is for single samples, by turns.
    loop {
        let single = (0..cells.len())
            .filter(|index| targets[*index] > 0 && targets[*index] < cells[*index].most)
            .filter(|index| cells[*index].cost <= left && cells[*index].cost > 0.0)
            .min_by_key(|index| targets[*index]);
        let Some(index) = single else { return targets };
        left -= cells[index].cost;
        targets[index] += 1;
    }
}

/// Whether an executor that is to have `target` samples, spread over `rounds`, has its turn in a round (from zero). `phase`, from 0 to
/// 1, says where in them it begins.
pub fn is_due(taken: u32, target: u32, round: u32, rounds: u32, phase: f64) -> bool {
    let by_now = f64::from(round + 1) * f64::from(target) / f64::from(rounds.max(1)) + phase;
    taken < target && f64::from(taken) < by_now.floor()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(cost: f64) -> Cell {
        Cell { cost, weight: 1.0, taken: 0, most: 20 }
    }

    #[test]
    fn slow_executors_leave_the_fast_ones_their_samples() {
        assert_eq!(allocate(&[cell(0.1), cell(10.0), cell(0.2)], 50.0), [20, 4, 20]);
        // What does not fit has none.
        assert_eq!(allocate(&[cell(0.1), cell(40.0)], 10.0), [20, 0]);
        // One of each is worth more than many of one.
        assert_eq!(allocate(&[cell(1.0), cell(8.0)], 15.0), [7, 1]);
        assert_eq!(allocate(&[], 5.0), Vec::<u32>::new());
    }

    #[test]
    fn everything_is_taken_where_time_is_plenty() {
        assert_eq!(allocate(&[cell(0.1), cell(10.0)], 1e6), [20, 20]);
        assert_eq!(allocate(&[Cell { most: 33, ..cell(0.0) }], 0.0), [33]);
    }

    #[test]
    fn what_was_taken_counts() {
        assert_eq!(allocate(&[Cell { taken: 7, ..cell(1.0) }, cell(1.0)], 0.0), [7, 0]);
        assert_eq!(allocate(&[Cell { taken: 7, ..cell(1.0) }, cell(1.0)], 1.0), [7, 1]);
        assert_eq!(allocate(&[Cell { taken: 7, ..cell(1.0) }], 3.0), [10]);
        assert_eq!(allocate(&[Cell { taken: 9, most: 5, ..cell(1.0) }], 3.0), [5]);
    }

    #[test]
    fn heavy_cells_are_served_before_light_ones() {
        let heavy = Cell { weight: 4.0, ..cell(10.0) };
        assert_eq!(allocate(&[cell(9.0), heavy], 10.0), [0, 1]);
    }

    #[test]
    fn few_samples_are_spread_over_all_rounds() {
        for phase in [0.0, 0.3, 0.99] {
            let mut taken = 0;
            let mut turns = vec![];
            for round in 0..20 {
                if is_due(taken, 3, round, 20, phase) {
                    taken += 1;
                    turns.push(round);
                }
            }
            assert_eq!(taken, 3, "{phase}");
            assert!(turns.windows(2).all(|pair| (6..=7).contains(&(pair[1] - pair[0]))), "{turns:?}");
        }
        assert!((0..5).all(|round| is_due(round, 5, round, 5, 0.5)));
    }
}
