//! Cut.
use crate::{cli, error::Error};
pub(crate) fn run(_args: &cli::Cut) -> Result<String, Error> {
    Err(Error::Usage("not yet".into()))
}
