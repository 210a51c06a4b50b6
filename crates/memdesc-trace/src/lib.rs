//! Reads what Linux tells of its memory.
