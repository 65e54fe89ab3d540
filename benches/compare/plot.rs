//! Panels of bars as SVG.

use std::fmt::Write;

use serde_json::Value;

const WIDTH: f64 = 760.0;
const BAR: f64 = 26.0;
const GAP: f64 = 14.0;
const LEFT: f64 = 170.0;
const RIGHT: f64 = 120.0;

/// What one panel shows of each proxy: (minimum, median, maximum), or nothing.
type Shown<'a> = &'a dyn Fn(&Value) -> Option<[f64; 3]>;

/// CPU time, latency at the same work, and capacity and latency at half of it where they were looked for.
pub(crate) fn panels(title: &str, unit: &str, results: &[Value]) -> String {
    let spread =
        |at: &Value| Some([at["min"].as_f64()?, at["median"].as_f64()?, at["max"].as_f64()?]);
    let one = |at: Option<f64>| at.map(|value| [value; 3]);
    let half = |result: &Value| {
        let shares = result["latency_at_share_of_capacity"].as_array()?;
        shares.iter().find(|share| share["percent"] == 50)?["p99"].as_f64()
    };
    let cpu = format!("us of CPU per {unit} at the same work (median; line: minimum to maximum)");
    let capacity = format!("capacity, {unit}s a second");
    let all: [(&str, Shown<'_>); 4] = [
        (&cpu, &|result| spread(&result["cpu_us"])),
        ("p99 at the same work, us (median; line: minimum to maximum)", &|it| {
            spread(&it["p99_us"])
        }),
        (&capacity, &|result| one(result["capacity"]["rate"].as_f64())),
        ("p99 at half of its own capacity, us", &|result| one(half(result))),
    ];
    let (mut body, mut top) = (String::new(), 36.0);
    for (axis, shown) in all {
        bars(&mut body, &mut top, axis, results, shown);
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {top}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"22\" font-size=\"14\" font-weight=\"bold\">{}</text>\n{body}</svg>\n",
        escape(title)
    )
}

/// Bars, with whiskers from the least to the most; `top` moves down by what they take.
fn bars(svg: &mut String, top: &mut f64, axis: &str, results: &[Value], shown: Shown<'_>) {
    let values: Vec<(&Value, [f64; 3])> =
        results.iter().filter_map(|result| Some((result, shown(result)?))).collect();
    let most = values.iter().map(|(_, [.., high])| *high).fold(0.0, f64::max);
    if most == 0.0 {
        return;
    }
    let scale = (WIDTH - LEFT - RIGHT) / most;
    // Writing to a string cannot fail.
    let _infallible =
        writeln!(svg, "<text x=\"12\" y=\"{}\" fill=\"#555555\">{axis}</text>", *top + 12.0);
    let start = *top + 26.0;
    *top = start + values.len() as f64 * (BAR + GAP) + 16.0;
    for (place, (result, [low, middle, high])) in values.into_iter().enumerate() {
        let y = start + place as f64 * (BAR + GAP);
        let colour = if place == 0 { "#2f6fab" } else { "#b8bec6" };
        let middle_y = y + BAR / 2.0;
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
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
