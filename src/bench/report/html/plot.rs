//! A chart of rows: each has a label, a figure, and marks along a common axis.
//!
//! Drawn by plotters into SVG. The page's style sheet takes the colours below by their names in the SVG and replaces them in
//! dark mode, so these are keys as much as colours.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::bench::report::format::{self, Scale};
use crate::bench::results::Unit;

pub const INK: RGBColor = RGBColor(0x1B, 0x1F, 0x24);
pub const MUTED: RGBColor = RGBColor(0x57, 0x60, 0x6A);
pub const LINE: RGBColor = RGBColor(0xDD, 0xE1, 0xE6);
/// Colours of isolations and of parts, distinguishable without red and green, and each at least 3:1 on its background.
pub const GREY: RGBColor = RGBColor(0x6B, 0x72, 0x80);
pub const BLUE: RGBColor = RGBColor(0x00, 0x6B, 0xB3);
pub const ORANGE: RGBColor = RGBColor(0xC2, 0x57, 0x0C);
pub const PURPLE: RGBColor = RGBColor(0x7A, 0x3E, 0x9D);

/// Pixels from a row's label to the next.
const ROW: i32 = 44;
/// Pixels from a row's top to the middle of its marks.
const LANE: i32 = 29;
const MARGIN: i32 = 10;
const AXIS: i32 = 26;
/// Pixels of a character, a little more than most have.
const CHARACTER: usize = 7;

/// What stands along an axis.
pub enum Mark {
    /// A sample.
    Sample(f64),
    /// A filled circle.
    Dot(f64),
    /// An open circle.
    Ring(f64),
    /// A small square.
    Square(f64),
    /// An upright line.
    Tick(f64),
    /// A thin line from one to the other.
    Span(f64, f64),
    /// A bar from one to the other.
    Bar(f64, f64),
}

impl Mark {
    fn ends(&self) -> [f64; 2] {
        match *self {
            Mark::Sample(at) | Mark::Dot(at) | Mark::Ring(at) | Mark::Square(at) | Mark::Tick(at) => [at, at],
            Mark::Span(from, to) | Mark::Bar(from, to) => [from, to],
        }
    }
}

/// One row.
pub struct Row {
    pub label: String,
    pub figure: String,
    pub marks: Vec<(Mark, RGBColor)>,
}

/// A chart.
pub struct Plot {
    /// For those who do not see it.
    pub title: String,
    /// `None`: the axis counts how many times.
    pub unit: Option<Unit>,
    /// How many times is counted from one to both sides.
    pub both_ways: bool,
    pub logarithmic: bool,
    /// An upright line through all rows.
    pub reference: Option<f64>,
    pub rows: Vec<Row>,
}

/// Both sizes of a chart: the page shows the one that fits. Nothing if there is nothing to draw.
pub fn draw(plot: &Plot) -> Option<String> {
    let mut text = String::new();
    for (class, width) in [("wide", 640), ("narrow", 312)] {
        let svg = one(plot, width)?;
        let label = maud::html! { (plot.title) }.into_string().replace('"', "&quot;");
        text.push_str(&svg.replacen(
            "<svg ",
            &format!("<svg class=\"plot {class}\" role=\"img\" aria-label=\"{label}\" "),
            1,
        ));
    }
    Some(text)
}

fn one(plot: &Plot, width: u32) -> Option<String> {
    let axis = Axis::of(plot, (width / 80) as usize)?;
    let height = ROW * i32::try_from(plot.rows.len()).ok()? + AXIS + 2 * MARGIN;
    let mut svg = String::new();
    {
        let root =
            SVGBackend::with_string(&mut svg, (width, u32::try_from(height).ok()?)).into_drawing_area();
        rows(&root, plot, &axis, width as usize).ok()?;
        root.present().ok()?;
    }
    Some(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Failed = Box<dyn std::error::Error>;

fn rows(root: &Area, plot: &Plot, axis: &Axis, width: usize) -> Result<(), Failed> {
    let bottom = ROW * plot.rows.len() as i32;
    let mut chart = ChartBuilder::on(root)
        .margin(MARGIN)
        .x_label_area_size(AXIS)
        .build_cartesian_2d(axis.low..axis.high, f64::from(bottom)..0.0)
        .map_err(|error| error.to_string())?;
    let end = f64::from(bottom);
    let text = |size: f64, colour: &RGBColor, side| {
        // plotters divides sizes by this before it writes them.
        ("sans-serif", size * 1.24).into_font().color(colour).pos(Pos::new(side, VPos::Center))
    };
    let upright =
        |at: f64, colour: RGBColor| PathElement::new(vec![(at, 0.0), (at, end)], colour.stroke_width(1));
    chart
        .draw_series(axis.ticks.iter().map(|(at, _)| upright(*at, LINE)))
        .map_err(|error| error.to_string())?;
    if let Some(at) = plot.reference.and_then(|at| axis.within(at)) {
        chart.draw_series([upright(at, MUTED)]).map_err(|error| error.to_string())?;
    }
    let pixel = |chart: &ChartContext<SVGBackend, _>, x: f64, y: f64| chart.backend_coord(&(x, y));
    for (at, label) in &axis.ticks {
        let (x, y) = pixel(&chart, *at, end);
        let half = (label.chars().count() * CHARACTER / 2) as i32;
        let x = x.clamp(half, width as i32 - half);
        root.draw(&Text::new(label.clone(), (x, y + 16), text(11.5, &MUTED, HPos::Center)))?;
    }
    for (index, row) in plot.rows.iter().enumerate() {
        let top = f64::from(ROW * index as i32);
        let room = (width - 2 * MARGIN as usize) / CHARACTER;
        let label = shortened(&row.label, room.saturating_sub(row.figure.chars().count() + 1));
        let lane = top + f64::from(LANE);
        let (_, y) = pixel(&chart, axis.low, top + 11.0);
        root.draw(&Text::new(label, (MARGIN, y), text(13.0, &INK, HPos::Left)))?;
        let right = width as i32 - MARGIN;
        root.draw(&Text::new(row.figure.clone(), (right, y), text(13.0, &MUTED, HPos::Right)))?;
        for (number, (mark, colour)) in row.marks.iter().enumerate() {
            let [Some(from), Some(to)] = mark.ends().map(|end| axis.within(end)) else { continue };
            let (x, y) = pixel(&chart, from, lane);
            let (x_to, _) = pixel(&chart, to, lane);
            draw_mark(root, mark, *colour, number, (x, x_to, y))?;
        }
    }
    Ok(())
}

fn draw_mark(
    root: &Area,
    mark: &Mark,
    colour: RGBColor,
    number: usize,
    at: (i32, i32, i32),
) -> Result<(), Failed> {
    let (x, x_to, y) = at;
    // Samples that are close together are told apart by their height, the same in every drawing.
    let scatter = (number.wrapping_mul(7) % 13) as i32 - 6;
    match mark {
        Mark::Sample(_) => root.draw(&Circle::new((x, y + scatter), 3, colour.mix(0.4).filled()))?,
        Mark::Dot(_) => root.draw(&Circle::new((x, y), 5, colour.filled()))?,
        Mark::Ring(_) => root.draw(&Circle::new((x, y), 5, colour.stroke_width(2)))?,
        Mark::Square(_) => root.draw(&Rectangle::new([(x - 4, y - 4), (x + 4, y + 4)], colour.filled()))?,
        Mark::Tick(_) => {
            root.draw(&PathElement::new(vec![(x, y - 9), (x, y + 9)], colour.stroke_width(3)))?
        }
        Mark::Span(..) => root.draw(&PathElement::new(vec![(x, y), (x_to, y)], colour.stroke_width(3)))?,
        // What is there is seen, however small.
        Mark::Bar(..) => {
            root.draw(&Rectangle::new([(x, y - 7), (x_to.max(x + 1), y + 7)], colour.filled()))?
        }
    }
    Ok(())
}

fn shortened(text: &str, most: usize) -> String {
    match text.chars().count() > most {
        true => text.chars().take(most.saturating_sub(1)).collect::<String>() + "…",
        false => text.to_owned(),
    }
}

/// An axis; places on it are logarithms where it is logarithmic.
struct Axis {
    logarithmic: bool,
    low: f64,
    high: f64,
    ticks: Vec<(f64, String)>,
}

impl Axis {
    fn of(plot: &Plot, most_ticks: usize) -> Option<Axis> {
        let shown =
            |value: &f64| value.is_finite() && value.abs() < 1e200 && (!plot.logarithmic || *value > 1e-200);
        let marks = plot.rows.iter().flat_map(|row| &row.marks).flat_map(|(mark, _)| mark.ends());
        let ends: Vec<f64> = marks.chain(plot.reference).filter(shown).collect();
        let marked =
            plot.rows.iter().flat_map(|row| &row.marks).any(|(mark, _)| mark.ends().iter().all(shown));
        let (low, high) = ends
            .iter()
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(*v), high.max(*v)));
        if !marked || low > high {
            return None;
        }
        let (low, high) = match plot.logarithmic {
            true => {
                let margin = ((high / low).ln() * 0.04).max(0.02).exp();
                (low / margin, high * margin)
            }
            false if high > low.min(0.0) => (low.min(0.0), high + (high - low.min(0.0)) * 0.03),
            false => (low - 1.0, high + 1.0),
        };
        let values = match plot.logarithmic {
            true => logarithmic_ticks(low, high, most_ticks),
            // Round in the unit that they are shown in.
            false => {
                let divisor = plot.unit.map_or(1.0, |unit| Scale::of(unit, high).divisor());
                ticks(low / divisor, high / divisor, most_ticks)
                    .into_iter()
                    .map(|tick| tick * divisor)
                    .collect()
            }
        };
        let mut axis = Axis { logarithmic: plot.logarithmic, low, high, ticks: vec![] };
        let label = |value: f64| match plot.unit {
            Some(unit) => short(&format::figure(unit, value)),
            None if plot.both_ways && value < 1.0 => short(&format::factor(1.0 / value)) + "×",
            None => short(&format::factor(value)) + "×",
        };
        axis.ticks =
            values.into_iter().filter_map(|value| Some((axis.place(value)?, label(value)))).collect();
        if axis.logarithmic {
            (axis.low, axis.high) = (low.log10(), high.log10());
        }
        (axis.low < axis.high).then_some(axis)
    }

    /// The place of a value that the axis reaches.
    fn within(&self, value: f64) -> Option<f64> {
        self.place(value).filter(|place| (self.low..=self.high).contains(place))
    }

    fn place(&self, value: f64) -> Option<f64> {
        let place = if self.logarithmic { value.log10() } else { value };
        place.is_finite().then_some(place)
    }
}

/// Round values in a range.
fn ticks(low: f64, high: f64, most: usize) -> Vec<f64> {
    let rough = (high - low) / most.max(2) as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|step| *step >= rough).unwrap_or(rough);
    let first = (low / step).ceil();
    (0..=most + 1).map(|n| (first + n as f64) * step).filter(|value| (low..=high).contains(value)).collect()
}

/// Powers of ten, as many as have room; between them where there are few.
fn logarithmic_ticks(low: f64, high: f64, most: usize) -> Vec<f64> {
    let decades = (high / low).log10();
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let within = |value: &f64| (low..=high).contains(value);
    if decades < 0.7 {
        return ticks(low, high, most);
    }
    let steps: &[f64] = if decades * 3.0 <= most as f64 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let every = ((decades / most.max(1) as f64).ceil() as usize).max(1);
    let powers =
        (first..=last).filter(|power| power.rem_euclid(every as i32) == 0).map(|power| 10f64.powi(power));
    powers.flat_map(|power| steps.iter().map(move |step| step * power)).filter(within).collect()
}

/// Without the zeros that a round number has behind its point.
fn short(figure: &str) -> String {
    let end = figure.find(|c: char| !c.is_ascii_digit() && !".-\u{202f}".contains(c)).unwrap_or(figure.len());
    let (digits, unit) = figure.split_at(end);
    match digits.contains('.') {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_owned() + unit,
        false => figure.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(marks: Vec<Mark>, logarithmic: bool) -> Plot {
        let row = Row {
            label: "a <b>".into(),
            figure: "1".into(),
            marks: marks.into_iter().map(|m| (m, BLUE)).collect(),
        };
        Plot {
            title: "t \"<".into(),
            unit: Some(Unit::Seconds),
            both_ways: false,
            logarithmic,
            reference: None,
            rows: vec![row],
        }
    }

    #[test]
    fn foreign_text_stays_text() {
        let svg = draw(&plot(vec![Mark::Dot(1.0), Mark::Dot(3.0)], true)).unwrap();
        assert!(svg.contains("a &lt;b&gt;") && svg.contains("aria-label=\"t &quot;&lt;\""), "{svg}");
    }

    #[test]
    fn nothing_to_draw_is_no_chart() {
        for marks in [vec![], vec![Mark::Dot(f64::NAN)], vec![Mark::Dot(0.0)], vec![Mark::Span(-1.0, 2.0)]] {
            assert!(draw(&plot(marks, true)).is_none());
        }
    }

    #[test]
    fn any_range_is_drawn_and_has_few_ticks() {
        let values = [1e-300, 1e-9, 1.0, 1.0 + 1e-12, 3.0, 1e9, 1e199, 1e300];
        for (from, to) in values.iter().flat_map(|a| values.iter().map(move |b| (*a, *b))) {
            for logarithmic in [true, false] {
                let plot = plot(vec![Mark::Span(from, to), Mark::Dot(from)], logarithmic);
                draw(&plot);
                if let Some(axis) = Axis::of(&plot, 8) {
                    assert!(axis.ticks.len() < 30, "{from} {to}: {}", axis.ticks.len());
                }
            }
        }
    }

    #[test]
    fn tick_has_no_needless_zeros() {
        assert_eq!(short("10.0 ms"), "10 ms");
        assert_eq!(short("1.50 s"), "1.5 s");
        assert_eq!(short("100 ms"), "100 ms");
        assert_eq!(short("0.100"), "0.1");
    }
}
