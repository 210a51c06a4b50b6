//! Where one would rather look than read: bars, and memory as a map of one character a piece.

/// Eighths of a character cell, from left.
const EIGHTHS: [char; 8] = ['▏', '▎', '▍', '▌', '▋', '▊', '▉', '█'];
/// Shades from free to full.
const SHADES: [char; 5] = ['·', '░', '▒', '▓', '█'];

/// A bar of at most `width` cells for a share of 0 to 1. What is not nothing shows.
pub(crate) fn bar(share: f64, width: usize) -> String {
    let share = share.clamp(0.0, 1.0);
    let eighths = (share * width as f64 * 8.0).round() as usize;
    let eighths = eighths.max(usize::from(share > 0.0));
    let mut text = "█".repeat(eighths / 8);
    if eighths % 8 > 0 {
        text.push(EIGHTHS[eighths % 8 - 1]);
    }
    text
}

/// Shares of 0 to 1 as shades, in rows of `width`.
pub(crate) fn map(shares: &[f64], width: usize) -> Vec<String> {
    let shade = |&share: &f64| match share {
        s if s <= 0.0 => SHADES[0],
        s if s >= 1.0 => SHADES[4],
        s => SHADES[1 + ((s * 3.0) as usize).min(2)],
    };
    shares
        .chunks(width.max(1))
        .map(|row| row.iter().map(shade).collect())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars() {
        assert_eq!(bar(0.0, 10), "");
        assert_eq!(bar(1e-9, 10), "▏");
        assert_eq!(bar(0.5, 3), "█▌");
        assert_eq!(bar(7.0, 3), "███");
    }

    #[test]
    fn maps() {
        assert_eq!(map(&[0.0, 0.1, 0.5, 0.9, 1.0], 4), ["·░▒▓", "█"]);
    }
}
