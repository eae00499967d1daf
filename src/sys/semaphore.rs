//! System V semaphores of udev cookies, with a time limit on the wait.
//!
//! The protocol is that of libdevmapper. The semaphore's key is the cookie, and its value counts the uevents
//! that udev has not finished. udev's rules decrement it (`dmsetup udevcomplete`); its creator waits for zero
//! and destroys it. The kernel keeps a semaphore until it is destroyed, so it is always destroyed on drop.

use std::io;
use std::time::Duration;

/// One semaphore with its own key, destroyed on drop.
#[derive(Debug)]
pub struct CookieSemaphore {
    id: libc::c_int,
}

impl CookieSemaphore {
    /// Creates the semaphore with `key` and the value `count`.
    ///
    /// # Errors
    /// EEXIST if the key is taken; ENOSPC, ENOMEM; ENOSYS without System V IPC.
    pub fn create(key: u32, count: u16) -> io::Result<Self> {
        let key = libc::key_t::from_ne_bytes(key.to_ne_bytes());
        // SAFETY: semget takes no pointers.
        let id = unsafe { libc::semget(key, 1, 0o600 | libc::IPC_CREAT | libc::IPC_EXCL) };
        if id < 0 {
            return Err(io::Error::last_os_error());
        }
        let semaphore = Self { id };
        // SAFETY: SETVAL reads its variadic argument as `union semun { int val; ... }`, which the C
        // ABI passes as an int here; `id` is a set of one semaphore, index 0 exists.
        let result = unsafe { libc::semctl(id, 0, libc::SETVAL, libc::c_int::from(count)) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(semaphore)
    }

    /// Waits until the value is zero; false if `limit` passes first.
    ///
    /// # Errors
    /// EINTR on a signal, EIDRM if another process destroyed it.
    pub fn wait_zero(&self, limit: Duration) -> io::Result<bool> {
        let mut operation = libc::sembuf { sem_num: 0, sem_op: 0, sem_flg: 0 };
        let limit = libc::timespec {
            tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: libc::c_long::from(limit.subsec_nanos()),
        };
        // SAFETY: one live `sembuf`, its count of 1, and a live `timespec`, all borrowed for the
        // duration of the call; the kernel reads them and writes neither.
        let result = unsafe {
            libc::syscall(
                libc::SYS_semtimedop,
                self.id,
                std::ptr::from_mut(&mut operation),
                1usize,
                std::ptr::from_ref(&limit),
            )
        };
        if result == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::EAGAIN) { Ok(false) } else { Err(error) }
    }
}

impl Drop for CookieSemaphore {
    fn drop(&mut self) {
        // SAFETY: IPC_RMID takes no further argument. Failure means that it is gone already.
        let _ = unsafe { libc::semctl(self.id, 0, libc::IPC_RMID) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_wait_ends_at_its_limit_and_the_semaphore_goes() {
        let key = 0x0d4d_0000 | (std::process::id() & 0xffff) | 1;
        let semaphore = match CookieSemaphore::create(key, 1) {
            Ok(semaphore) => semaphore,
            Err(error) => panic!("no System V semaphores here: {error}"),
        };
        assert!(CookieSemaphore::create(key, 1).is_err(), "the key is taken");
        let start = Instant::now();
        assert!(!semaphore.wait_zero(Duration::from_millis(30)).unwrap());
        assert!(start.elapsed() >= Duration::from_millis(30));
        drop(semaphore);
        let again = CookieSemaphore::create(key, 0).unwrap();
        assert!(again.wait_zero(Duration::from_secs(5)).unwrap());
    }
}
