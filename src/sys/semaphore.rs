//! System V semaphores of udev cookies, waited for with a time limit.
