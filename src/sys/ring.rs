//! A safe io_uring: the ring owns every buffer from submission to its final completion.
