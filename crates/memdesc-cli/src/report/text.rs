//! For people.
use crate::replay::Replay;
pub(crate) fn report(replay: &Replay) -> String {
    format!("{:#}\n", super::json::object(replay))
}
