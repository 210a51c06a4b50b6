//! The command `memdesc`.
fn main() {}
