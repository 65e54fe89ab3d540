//! Bars as SVG.

use std::fmt::Write;

use serde_json::Value;

const WIDTH: f64 = 760.0;
const BAR: f64 = 26.0;
const GAP: f64 = 14.0;
const LEFT: f64 = 170.0;
const RIGHT: f64 = 120.0;
const TOP: f64 = 64.0;

/// The medians as bars, minimum to maximum as whiskers.
pub(crate) fn bars(title: &str, axis: &str, results: &[Value]) -> String {
    let number = |result: &Value, key: &str| result["cpu_us"][key].as_f64().unwrap_or(0.0);
    let most = results.iter().map(|result| number(result, "max")).fold(1e-9, f64::max);
    let scale = (WIDTH - LEFT - RIGHT) / most;
    let height = TOP + results.len() as f64 * (BAR + GAP) + 16.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"22\" font-size=\"14\" font-weight=\"bold\">{}</text>\n\
         <text x=\"12\" y=\"42\" fill=\"#555555\">{axis} (median; line: minimum to maximum)</text>\n",
        escape(title)
    );
    for (place, result) in results.iter().enumerate() {
        let y = TOP + place as f64 * (BAR + GAP);
        let (low, middle, high) =
            (number(result, "min"), number(result, "median"), number(result, "max"));
        let colour = if place == 0 { "#2f6fab" } else { "#b8bec6" };
        let middle_y = y + BAR / 2.0;
        // Writing to a string cannot fail.
        let _infallible = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{LEFT}\" y=\"{y}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\n\
             <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle_y}\" y2=\"{middle_y}\" stroke=\"#222222\" stroke-width=\"2\"/>\n\
             <text x=\"{:.1}\" y=\"{}\">{middle:.1}</text>",
            LEFT - 8.0,
            middle_y + 5.0,
            escape(result["proxy"].as_str().unwrap_or("")),
            middle * scale,
            LEFT + low * scale,
            LEFT + high * scale,
            LEFT + high * scale + 8.0,
            middle_y + 5.0,
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
