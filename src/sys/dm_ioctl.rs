//! Device-mapper calls issued without a udev cookie wait: suspend, resume, remove, rename.
