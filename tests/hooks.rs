//! The ready-made hooks in `hooks/`, each against its real server: what it adds, and that nothing stays locked,
//! whatever fails or is killed. The copies are of a file, which needs no device-mapper; the hooks cannot tell.

#![allow(clippy::unwrap_used)] // a test panics, and says so

#[path = "commands/support.rs"]
#[allow(dead_code, clippy::print_stdout)] // shared with the command contracts, which use all of it
mod support;

#[path = "hooks/mariadb.rs"]
mod mariadb;
#[path = "hooks/postgresql.rs"]
mod postgresql;
#[path = "hooks/redis.rs"]
mod redis;
#[path = "hooks/servers.rs"]
mod servers;
