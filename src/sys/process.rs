//! The process itself: memory locking, signals, parent death, pidfds.
