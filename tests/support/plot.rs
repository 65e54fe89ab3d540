//! Lines over two axes as SVG.

use std::fmt::Write as _;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 60.0;
const BOTTOM: f64 = 46.0;
const TOP: f64 = 44.0;
const RIGHT: f64 = 200.0;

/// One line.
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) colour: &'static str,
    pub(crate) dashed: bool,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Lines whose values are from 0 to about 1; `label`, from, to and the step of the axis.
pub(crate) fn plot(
    title: &str,
    (label, (from, to), step): (&str, (f64, f64), f64),
    lines: &[Line],
) -> String {
    let x = |value: f64| LEFT + (value - from) / (to - from) * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| HEIGHT - BOTTOM - value.min(1.05) / 1.05 * (HEIGHT - BOTTOM - TOP);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{LEFT}\" y=\"24\" font-size=\"14\">{title}</text>\n"
    );
    let mut add = |text: String| {
        // Writing to a string cannot fail.
        let _ok = writeln!(svg, "{text}");
    };
    for tenth in 0..=5 {
        let value = f64::from(tenth) / 5.0;
        let at = y(value);
        add(format!(
            "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{value:.1}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            at + 4.0
        ));
    }
    let mut value = from;
    while value <= to + 1e-9 {
        add(format!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{value}</text>",
            x(value),
            HEIGHT - BOTTOM + 18.0
        ));
        value += step;
    }
    add(format!(
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 8.0
    ));
    for (index, line) in lines.iter().enumerate() {
        let points: Vec<String> = line
            .points
            .iter()
            .map(|&(at, value)| format!("{:.1},{:.1}", x(at), y(value)))
            .collect();
        let dash = if line.dashed { " stroke-dasharray=\"6 4\"" } else { "" };
        let style = format!("fill=\"none\" stroke=\"{}\" stroke-width=\"2\"{dash}", line.colour);
        add(format!("<polyline points=\"{}\" {style}/>", points.join(" ")));
        let (left, at) = (WIDTH - RIGHT + 14.0, TOP + 18.0 * index as f64);
        add(format!(
            "<line x1=\"{left}\" y1=\"{at}\" x2=\"{}\" y2=\"{at}\" {style}/><text x=\"{}\" y=\"{}\">{}</text>",
            left + 26.0,
            left + 32.0,
            at + 4.0,
            line.name
        ));
    }
    svg.push_str("</svg>\n");
    svg
}
