//! Numbers as people read them.

use std::time::Duration;

/// Digits in groups of three.
pub(super) fn n(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push('\u{2009}');
        }
        text.push(digit);
    }
    text
}

/// In the unit that fits.
pub(super) fn bytes(value: u64) -> String {
    let value = value as f64;
    match value {
        v if v >= 1e12 => format!("{:.2} TiB", v / (1u64 << 40) as f64),
        v if v >= 1e9 => format!("{:.2} GiB", v / (1u64 << 30) as f64),
        v if v >= 1e6 => format!("{:.2} MiB", v / (1u64 << 20) as f64),
        v => format!("{:.1} KiB", v / 1024.0),
    }
}

/// Millions a second.
pub(super) fn rate(events: u64, time: Duration) -> String {
    format!(
        "{:.2} M/s",
        events as f64 / time.as_secs_f64().max(1e-9) / 1e6
    )
}

/// Right-aligned in so many columns; the thin spaces count.
pub(super) fn right(text: &str, width: usize) -> String {
    let pad = width.saturating_sub(text.chars().count());
    format!("{}{text}", " ".repeat(pad))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(n(0), "0");
        assert_eq!(n(1234567), "1\u{2009}234\u{2009}567");
        assert_eq!(bytes(2048), "2.0 KiB");
        assert_eq!(bytes(24 << 30), "24.00 GiB");
        assert_eq!(right("ab", 4), "  ab");
    }
}
