//! memdesc hosted in a process.
