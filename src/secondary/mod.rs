//! Where a copy goes: raw device, raw file, archive, pipe.
