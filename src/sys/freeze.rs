//! Filesystem freeze and thaw (FIFREEZE, FITHAW), syncfs.
