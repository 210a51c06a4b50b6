//! Ledger.
use crate::{cli, error::Error};
pub(crate) fn run(_args: &cli::LedgerArgs) -> Result<u8, Error> {
    Err(Error::Usage("not yet".into()))
}
