//! Progress bars on a terminal; nothing in a pipe.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use memdesc_trace::Progress;

fn bar(quiet: bool, total: u64, template: &str) -> ProgressBar {
    // Standard error: the report may go into a file. Off a terminal indicatif draws nothing.
    let target = if quiet {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr_with_hz(10)
    };
    let bar = ProgressBar::with_draw_target(Some(total), target);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
    }
    bar
}

/// For reading a file.
pub(crate) fn bytes(quiet: bool) -> ProgressBar {
    bar(
        quiet,
        0,
        "reading   {wide_bar:.cyan} {bytes}/{total_bytes} {msg}",
    )
}

/// How far the reading has come.
pub(crate) fn reading(bar: &ProgressBar, progress: Progress) {
    if let Some(total) = progress.bytes_total {
        bar.set_length(total);
    }
    bar.set_position(progress.bytes_read);
}

/// For replaying events.
pub(crate) fn events(quiet: bool, total: u64) -> ProgressBar {
    bar(
        quiet,
        total,
        "replaying {wide_bar:.green} {human_pos}/{human_len} {per_sec}",
    )
}

/// For what takes a certain time.
pub(crate) fn seconds(quiet: bool, total: u64, what: &str) -> ProgressBar {
    let bar = bar(quiet, total, "{msg:9} {wide_bar:.yellow} {pos}/{len} s");
    bar.set_message(what.to_owned());
    bar
}

/// For a share of a whole, in thousandths.
pub(crate) fn share(quiet: bool, what: &str) -> ProgressBar {
    let bar = bar(quiet, 1000, "{msg:9} {wide_bar:.yellow} {percent} %");
    bar.set_message(what.to_owned());
    bar
}
