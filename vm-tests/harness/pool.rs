//! Runs several items in parallel: threads take items from a queue, in its order.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::thread;

/// Calls `work` for every item on `workers` threads, at least one, and returns when all are done. `work` is given the
/// thread's number, from 0; no two items run with the same number at a time. At most `heavy_max` items, at least one,
/// for which `is_heavy` is true run at a time, and these start first.
///
/// # Panics
/// If `work` does.
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
            // The first workers take heavy items as long as there are any; the other workers take none.
            let queues: &[&Mutex<VecDeque<T>>] = if worker < heavy_max { &[heavy, light] } else { &[light] };
            let queues = queues.to_vec();
            scope.spawn(move || {
                for queue in queues {
                    loop {
                        // A separate statement: in the condition of a `while let`, the queue would stay locked during
                        // the work, and only one thread would work at a time.
                        let next = locked(queue).pop_front();
                        let Some(item) = next else { break };
                        work(worker, item);
                    }
                }
            });
        }
    });
}

/// Locks `mutex`.
///
/// # Panics
/// If a thread has panicked while it held the lock.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread panics while it holds the lock")
}
