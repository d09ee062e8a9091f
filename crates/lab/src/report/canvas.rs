//! A small writer of SVG elements. Text is escaped, numbers have one decimal.

use std::fmt::Write;

/// SVG that is being written.
#[derive(Debug, Default)]
pub(super) struct Canvas {
    body: String,
}

/// Where a text stands relative to its point.
#[derive(Debug, Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

impl Canvas {
    /// A rectangle; nothing when it has no area.
    pub(super) fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, class: &str) {
        if width > 0.0 && height > 0.0 {
            self.push(format_args!(
                "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"/>"
            ));
        }
    }

    /// A straight line.
    pub(super) fn line(&mut self, from: (f64, f64), to: (f64, f64), class: &str) {
        self.push(format_args!(
            "<line class=\"{class}\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>",
            from.0, from.1, to.0, to.1
        ));
    }

    /// An open line through points.
    pub(super) fn polyline(&mut self, points: &[(f64, f64)], class: &str) {
        self.shape("polyline", points, class);
    }

    /// A filled shape.
    pub(super) fn polygon(&mut self, points: &[(f64, f64)], class: &str) {
        self.shape("polygon", points, class);
    }

    /// A dot.
    pub(super) fn dot(&mut self, x: f64, y: f64, radius: f64, class: &str) {
        self.push(format_args!(
            "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius:.1}\"/>"
        ));
    }

    /// Text on one line.
    pub(super) fn text(&mut self, x: f64, y: f64, anchor: Anchor, class: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        self.push(format_args!(
            "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>",
            escape(text)
        ));
    }

    /// The whole picture.
    pub(super) fn finish(self, width: f64, height: f64, label: &str, style: &str) -> String {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" \
             width=\"{width:.0}\" height=\"{height:.0}\" role=\"img\" aria-label=\"{}\">\n\
             <style>{style}</style>\n{}</svg>\n",
            escape(label),
            self.body
        )
    }

    fn shape(&mut self, element: &str, points: &[(f64, f64)], class: &str) {
        if points.len() < 2 {
            return;
        }
        let mut text = String::new();
        for (x, y) in points {
            // Writing to a string cannot fail.
            let _ = write!(text, "{x:.1},{y:.1} ");
        }
        self.push(format_args!("<{element} class=\"{class}\" points=\"{}\"/>", text.trim_end()));
    }

    fn push(&mut self, element: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.body, "{element}");
    }
}

/// Text as it may stand in XML.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Round distances between ticks, so that about `wanted` of them fit into `length`.
pub(super) fn tick_step(length: f64, wanted: f64) -> f64 {
    let rough = length / wanted;
    if rough <= 0.0 || !rough.is_finite() {
        return 1.0;
    }
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().find(|step| step * power >= rough);
    step.unwrap_or(10.0) * power
}
