//! How do several runs go at once? As many threads as asked for take what is queued, in its order.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::thread;

/// Calls `work` for every item, by `workers` threads, at least one; returns when all are done. It is given the thread's
/// number, from 0: no two items are worked on under the same number at a time. Of the items for which `is_heavy` is
/// true, at most `heavy_max`, at least one, are worked on at a time, and those are begun first.
///
/// # Panics
/// Where `work` does.
pub fn for_each<T: Send>(
    workers: usize,
    heavy_max: usize,
    items: impl IntoIterator<Item = T>,
    is_heavy: impl Fn(&T) -> bool,
    work: impl Fn(usize, T) + Sync,
) {
    let (heavy, light): (VecDeque<T>, VecDeque<T>) = items.into_iter().partition(is_heavy);
    let heavy_max = heavy_max.clamp(1, workers.max(1));
    let (heavy, light) = (Mutex::new(heavy), Mutex::new(light));
    thread::scope(|scope| {
        for worker in 0..workers.max(1) {
            let (heavy, light, work) = (&heavy, &light, &work);
            // The first workers take what is heavy as long as there is any; no other ever does.
            let queues: &[&Mutex<VecDeque<T>>] = if worker < heavy_max { &[heavy, light] } else { &[light] };
            let queues = queues.to_vec();
            scope.spawn(move || {
                for queue in queues {
                    loop {
                        // A statement of its own: in the head of a `while let` the queue would stay locked until the
                        // work is done, and all would work one after the other.
                        let next = locked(queue).pop_front();
                        let Some(item) = next else { break };
                        work(worker, item);
                    }
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
