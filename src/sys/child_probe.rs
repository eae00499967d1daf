//! Queries that the kernel may never answer, made by a child process: what is at a path, what backs a loop device.
//!
//! A path can lead to a file system whose server is gone (NFS, FUSE). The kernel then waits for the server,
//! in some cases in a way that no signal ends. A thread in such a wait keeps its process from exiting, with
//! every lock that the process holds. So a child process asks. It holds nothing of ours, and if it does not
//! answer in time, it is killed and left to the kernel.
//!
//! The child is a fork of a process with threads: it may call only what is async-signal-safe
//! (signal-safety(7)). [`Question::ask`] has to obey that.
//!
//! Answers come from what the kernel has cached (`AT_STATX_DONT_SYNC`), so that a server that is merely slow
//! is rarely asked.

use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

/// Longest wait for one answer about something in use: a local file system has the answer in memory.
pub const TIMEOUT: Duration = Duration::from_secs(2);

/// Longest wait for an answer about a path from the user. A disk that has to spin up, or is busy, needs time.
pub const TIMEOUT_FOR_NAMED: Duration = Duration::from_secs(20);

/// Time between two checks whether an answer is still wanted.
const WANTED_INTERVAL: Duration = Duration::from_millis(50);

/// The raw form of an answer.
pub type Words = [u64; WORDS];

/// Number of words in an answer.
pub const WORDS: usize = 6;

/// Bytes of an answer on the pipe: the errno, then the words. At most PIPE_BUF, so it is written atomically.
const REPLY_BYTES: usize = 8 * (WORDS + 1);

/// Held while a child has descriptors of this process: from its fork until it has closed them.
static FORK_LOCK: Mutex<()> = Mutex::new(());

/// Blocks forks. As long as the result lives, no child has a descriptor of this process, so that a search for
/// open files does not find a child's. No question can be asked meanwhile.
pub fn block_forks() -> MutexGuard<'static, ()> {
    // It protects no data, so a panic leaves nothing half-written.
    FORK_LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something that a child process asks the kernel.
///
/// # Safety
/// `ask` runs in the fork of a process with threads. It must not allocate, lock, or panic, nor call anything that is
/// not async-signal-safe.
pub unsafe trait Question {
    /// The decoded answer.
    type Answer;

    /// Asks. An error is an errno.
    ///
    /// # Errors
    /// The kernel's errno.
    fn ask(&self) -> Result<Words, i32>;

    /// Decodes an answer, in the parent.
    fn answer(words: Words) -> Self::Answer;
}

/// Asks all `questions`, in order, and waits at most [`TIMEOUT`] for each answer. [`io::ErrorKind::TimedOut`]
/// stands for a question without an answer.
#[must_use]
pub fn ask<Q: Question>(questions: &[Q]) -> Vec<io::Result<Q::Answer>> {
    ask_within(questions, TIMEOUT, &|| true)
}

/// Asks one question, as [`ask`], with its own `timeout`.
///
/// # Errors
/// The kernel's errno; [`io::ErrorKind::TimedOut`].
pub fn ask_one<Q: Question>(question: Q, timeout: Duration) -> io::Result<Q::Answer> {
    ask_one_while(question, timeout, &|| true)
}

/// As [`ask_one`], but the wait ends as soon as `is_wanted` returns false. It is called every [`WANTED_INTERVAL`].
///
/// # Errors
/// As [`ask_one`].
pub fn ask_one_while<Q: Question>(
    question: Q,
    timeout: Duration,
    is_wanted: &dyn Fn() -> bool,
) -> io::Result<Q::Answer> {
    ask_within(&[question], timeout, is_wanted).pop().unwrap_or_else(|| Err(io::ErrorKind::Other.into()))
}

fn ask_within<Q: Question>(
    questions: &[Q],
    timeout: Duration,
    is_wanted: &dyn Fn() -> bool,
) -> Vec<io::Result<Q::Answer>> {
    let mut answers = Vec::with_capacity(questions.len());
    while let Some(rest) = questions.get(answers.len()..).filter(|rest| !rest.is_empty()) {
        let mut child_process = match QueryChild::start(rest) {
            Ok(child_process) => child_process,
            Err(error) => {
                let kind = error.kind();
                answers.push(Err(error));
                answers.resize_with(questions.len(), || Err(kind.into()));
                return answers;
            }
        };
        // After a timeout another child asks the remaining questions.
        while answers.len() < questions.len() {
            let answer = child_process.next(timeout, is_wanted);
            let is_lost = answer.is_none();
            let answer = answer.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()));
            answers.push(answer.map(Q::answer));
            if is_lost {
                break;
            }
        }
    }
    answers
}

/// The parent's handle of the child.
struct QueryChild {
    child: Pid,
    replies: io::PipeReader,
}

impl QueryChild {
    fn start<Q: Question>(questions: &[Q]) -> io::Result<Self> {
        let (replies, child_end) = io::pipe()?;
        let pipe = child_end.as_raw_fd();
        let _no_forks = block_forks();
        // SAFETY: the child calls `answer_all` only, which keeps to what is async-signal-safe and does not return.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => {
                drop(child_end);
                let mut child_process = Self { child, replies };
                child_process.replies.read_exact(&mut [0; CLOSED.len()])?;
                Ok(child_process)
            }
            ForkResult::Child => answer_all(questions, pipe),
        }
    }

    /// None if there is no answer in time, `is_wanted` returns false, or the child has exited without an answer.
    fn next(&mut self, timeout: Duration, is_wanted: &dyn Fn() -> bool) -> Option<io::Result<Words>> {
        let end = Instant::now() + timeout;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let time = PollTimeout::try_from(left.min(WANTED_INTERVAL)).unwrap_or(PollTimeout::MAX);
            let mut wanted = [PollFd::new(self.replies.as_fd(), PollFlags::POLLIN)];
            match poll(&mut wanted, time) {
                Ok(0) | Err(Errno::EINTR) if left.is_zero() || !is_wanted() => return None,
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => break,
                Err(errno) => return Some(Err(errno.into())),
            }
        }
        let mut reply = [0; REPLY_BYTES];
        self.replies.read_exact(&mut reply).ok()?;
        let mut words =
            reply.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default()));
        let errno = words.next().and_then(|errno| i32::try_from(errno).ok()).unwrap_or(libc::EIO);
        let mut answer = Words::default();
        answer.iter_mut().zip(words).for_each(|(to, word)| *to = word);
        Some(if errno == 0 { Ok(answer) } else { Err(io::Error::from_raw_os_error(errno)) })
    }
}

impl Drop for QueryChild {
    fn drop(&mut self) {
        // It has exited, or has nothing more to do. A child that the kernel keeps waiting is not waited for:
        // it becomes a zombie when that wait ends, and init reaps it after our exit.
        let _ = kill(self.child, Signal::SIGKILL);
        for _ in 0..REAPING_ATTEMPTS {
            match waitpid(self.child, Some(WaitPidFlag::WNOHANG)) {
                Ok(nix::sys::wait::WaitStatus::StillAlive) => std::thread::sleep(REAPING_PAUSE),
                _ => return,
            }
        }
    }
}

/// The first byte from the child: it has closed what it inherited.
const CLOSED: [u8; 1] = [1];

/// Attempts to reap a killed child.
const REAPING_ATTEMPTS: u32 = 50;
/// Pause between two attempts.
const REAPING_PAUSE: Duration = Duration::from_micros(200);

/// Runs in the child.
fn answer_all<Q: Question>(questions: &[Q], pipe: RawFd) -> ! {
    let pipe_number = pipe.cast_unsigned();
    // SAFETY: these calls take numbers only. The descriptors that they close are this child's copies, which nothing
    // uses.
    unsafe {
        libc::syscall(libc::SYS_close_range, 0u32, pipe_number.saturating_sub(1), 0u32);
        libc::syscall(libc::SYS_close_range, pipe_number + 1, u32::MAX, 0u32);
    }
    // SAFETY: write() reads the constant, and no more than its length.
    if unsafe { libc::write(pipe, CLOSED.as_ptr().cast(), CLOSED.len()) } < 0 {
        // SAFETY: exits this process without running any code of its parent.
        unsafe { libc::_exit(0) }
    }
    for question in questions {
        let (errno, words) = match question.ask() {
            Ok(words) => (0, words),
            Err(errno) => (u64::from(errno.unsigned_abs()), Words::default()),
        };
        let mut reply = [0u8; REPLY_BYTES];
        for (to, word) in reply.chunks_exact_mut(8).zip(std::iter::once(errno).chain(words)) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        // SAFETY: write() reads `reply`, which is live, and no more than its length.
        if unsafe { libc::write(pipe, reply.as_ptr().cast(), REPLY_BYTES) } < 0 {
            break;
        }
    }
    // SAFETY: exits this process without running any code of its parent.
    unsafe { libc::_exit(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers with its number after a pause; an odd number gives ENOENT.
    struct After {
        number: u64,
        pause_ms: libc::c_int,
    }

    // SAFETY: poll() is async-signal-safe, and nothing else is called.
    unsafe impl Question for After {
        type Answer = u64;

        fn ask(&self) -> Result<Words, i32> {
            // SAFETY: no descriptors are passed.
            unsafe { libc::poll(std::ptr::null_mut(), 0, self.pause_ms) };
            if self.number % 2 == 1 { Err(libc::ENOENT) } else { Ok([self.number; WORDS]) }
        }

        fn answer(words: Words) -> u64 {
            words[WORDS - 1]
        }
    }

    #[test]
    fn a_question_without_answer_does_not_block_the_others() {
        let question = |number, pause_ms| After { number, pause_ms };
        let questions =
            [question(2, 0), question(4, 60_000), question(3, 0), question(6, 0), question(8, 60_000)];
        let begin = Instant::now();
        let answers = ask_within(&questions, Duration::from_millis(300), &|| true);
        assert!(begin.elapsed() < Duration::from_secs(30));
        let of = |answer: &io::Result<u64>| answer.as_ref().map_err(io::Error::kind).copied();
        let timed_out = Err(io::ErrorKind::TimedOut);
        let expected = [Ok(2), timed_out, Err(io::ErrorKind::NotFound), Ok(6), timed_out];
        assert_eq!(answers.iter().map(of).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn the_wait_ends_when_the_answer_is_no_longer_wanted() {
        let begin = Instant::now();
        let is_wanted = || begin.elapsed() < Duration::from_millis(200);
        let answer = ask_one_while(After { number: 2, pause_ms: 60_000 }, TIMEOUT_FOR_NAMED, &is_wanted);
        assert_eq!(answer.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(begin.elapsed() < Duration::from_secs(15));
    }

    /// Answers with the number of open descriptors.
    struct Inherited;

    // SAFETY: fcntl() is async-signal-safe, and nothing else is called.
    unsafe impl Question for Inherited {
        type Answer = u64;

        fn ask(&self) -> Result<Words, i32> {
            // SAFETY: F_GETFD takes numbers only.
            let open = (0..1024).filter(|fd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0).count();
            Ok([u64::try_from(open).unwrap_or(u64::MAX); WORDS])
        }

        fn answer(words: Words) -> u64 {
            words[0]
        }
    }

    #[test]
    fn the_child_has_no_descriptors_of_its_parent() {
        let _held = tempfile::tempfile().unwrap();
        assert_eq!(ask(&[Inherited])[0].as_ref().unwrap(), &1, "only its pipe");
    }
}
