//! How do several runs go at once? As many threads as asked for take what is queued, in its order.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::thread;

/// Calls `work` for every item, by `workers` threads, at least one; returns when all are done.
///
/// # Panics
/// Where `work` does.
pub fn for_each<T: Send>(workers: usize, items: impl IntoIterator<Item = T>, work: impl Fn(T) + Sync) {
    let queue: Mutex<VecDeque<T>> = Mutex::new(items.into_iter().collect());
    thread::scope(|scope| {
        for _ in 0..workers.max(1) {
            scope.spawn(|| {
                loop {
                    // A statement of its own: in the head of a `while let` the queue would stay locked until the
                    // work is done, and all would work one after the other.
                    let next = locked(&queue).pop_front();
                    let Some(item) = next else { break };
                    work(item);
                }
            });
        }
    });
}

/// What `mutex` guards.
///
/// # Panics
/// Where a thread has panicked while it held the lock.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread panics while it holds the lock")
}
