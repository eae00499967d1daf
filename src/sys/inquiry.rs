//! Questions to which there may be no answer: what is at a path, what does a loop device show?
//!
//! A path can lead to a file system whose server is gone (NFS, FUSE). The kernel then waits for the server, and there are
//! waits that no signal ends. A thread that is caught in one keeps its process from ending, with every lock that the
//! process holds. So a child process asks. It holds nothing of ours, and if it does not answer in time, it is killed and
//! left to the kernel.
//!
//! The child is a fork of a process with threads: until its end it may call nothing but what is async-signal-safe
//! (signal-safety(7)). [`Question::ask`] has to keep to that.
//!
//! Answers come from what the kernel knows already (`AT_STATX_DONT_SYNC`), so that a server that is merely slow is rarely
//! asked.

use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

/// Longest wait for one answer about what is in use: a local file system has that in memory.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// Longest wait for an answer about what a person has named. A disk that has to wake up, or is busy, takes its time.
pub const PATIENCE_FOR_NAMED: Duration = Duration::from_secs(20);

/// What an answer is made of.
pub type Words = [u64; WORDS];

/// Words of an answer.
pub const WORDS: usize = 6;

/// Bytes of an answer on the pipe: the errno, then the words. Less than PIPE_BUF, so it arrives whole.
const REPLY_BYTES: usize = 8 * (WORDS + 1);

/// Held while a child has descriptors of this process: from its fork until it has closed them.
static BIRTH: Mutex<()> = Mutex::new(());

/// No child has a descriptor of this process as long as the answer lives, for a look at who has what open. Nothing can be
/// asked meanwhile.
pub fn no_births() -> MutexGuard<'static, ()> {
    // It guards nothing that could be left half-made.
    BIRTH.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something that a child process asks the kernel.
///
/// # Safety
/// `ask` runs in the fork of a process with threads. It must not allocate, lock, or panic, nor call anything that is not
/// async-signal-safe.
pub unsafe trait Question {
    /// What the words of an answer mean.
    type Answer;

    /// Asks. An error is an errno.
    ///
    /// # Errors
    /// The kernel's errno.
    fn ask(&self) -> Result<Words, i32>;

    /// Runs in the process that wants to know.
    fn answer(words: Words) -> Self::Answer;
}

/// Asks all `questions`, in order, and waits [`PATIENCE`] for each answer at most. [`io::ErrorKind::TimedOut`] stands for
/// a question that was not answered.
#[must_use]
pub fn ask<Q: Question>(questions: &[Q]) -> Vec<io::Result<Q::Answer>> {
    ask_within(questions, PATIENCE)
}

/// Asks one question, as [`ask`], with a `patience` of its own.
///
/// # Errors
/// The kernel's errno; [`io::ErrorKind::TimedOut`].
pub fn ask_one<Q: Question>(question: Q, patience: Duration) -> io::Result<Q::Answer> {
    ask_within(&[question], patience).pop().unwrap_or_else(|| Err(io::ErrorKind::Other.into()))
}

fn ask_within<Q: Question>(questions: &[Q], patience: Duration) -> Vec<io::Result<Q::Answer>> {
    let mut answers = Vec::with_capacity(questions.len());
    while let Some(rest) = questions.get(answers.len()..).filter(|rest| !rest.is_empty()) {
        let mut asker = match Asker::start(rest) {
            Ok(asker) => asker,
            Err(error) => {
                let kind = error.kind();
                answers.push(Err(error));
                answers.resize_with(questions.len(), || Err(kind.into()));
                return answers;
            }
        };
        // After a question that is not answered another child asks the rest.
        while answers.len() < questions.len() {
            let answer = asker.next(patience);
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

/// The child, as its parent sees it.
struct Asker {
    child: Pid,
    replies: io::PipeReader,
}

impl Asker {
    fn start<Q: Question>(questions: &[Q]) -> io::Result<Self> {
        let (replies, theirs) = io::pipe()?;
        let pipe = theirs.as_raw_fd();
        let _birth = no_births();
        // SAFETY: the child calls `answer_all` only, which keeps to what is async-signal-safe and does not return.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => {
                drop(theirs);
                let mut asker = Self { child, replies };
                asker.replies.read_exact(&mut [0; CLOSED.len()])?;
                Ok(asker)
            }
            ForkResult::Child => answer_all(questions, pipe),
        }
    }

    /// None where there is none in time, or the child has ended without one.
    fn next(&mut self, patience: Duration) -> Option<io::Result<Words>> {
        let end = Instant::now() + patience;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let time = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut wanted = [PollFd::new(self.replies.as_fd(), PollFlags::POLLIN)];
            match poll(&mut wanted, time) {
                Ok(0) => return None,
                Ok(_) => break,
                Err(Errno::EINTR) => {}
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

impl Drop for Asker {
    fn drop(&mut self) {
        // It has ended, or has nothing more to do. One that the kernel keeps waiting is not waited for: it becomes a
        // zombie once it is let go, and the kernel's after our end.
        let _ = kill(self.child, Signal::SIGKILL);
        for _ in 0..REAPING_ATTEMPTS {
            match waitpid(self.child, Some(WaitPidFlag::WNOHANG)) {
                Ok(nix::sys::wait::WaitStatus::StillAlive) => std::thread::sleep(REAPING_PAUSE),
                _ => return,
            }
        }
    }
}

/// What a child says first: it has closed what it inherited.
const CLOSED: [u8; 1] = [1];

/// How often the end of a killed child is looked for.
const REAPING_ATTEMPTS: u32 = 50;
/// Pause in between.
const REAPING_PAUSE: Duration = Duration::from_micros(200);

/// The child.
fn answer_all<Q: Question>(questions: &[Q], pipe: RawFd) -> ! {
    let pipe_number = pipe.cast_unsigned();
    // SAFETY: these calls take numbers only. The descriptors that they close are this child's copies, which nothing uses.
    unsafe {
        libc::syscall(libc::SYS_close_range, 0u32, pipe_number.saturating_sub(1), 0u32);
        libc::syscall(libc::SYS_close_range, pipe_number + 1, u32::MAX, 0u32);
    }
    // SAFETY: write() reads the constant, and no more than its length.
    if unsafe { libc::write(pipe, CLOSED.as_ptr().cast(), CLOSED.len()) } < 0 {
        // SAFETY: ends this process without running anything of its parent's.
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
    // SAFETY: ends this process without running anything of its parent's.
    unsafe { libc::_exit(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers with its number after a pause; an odd one with that errno.
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
    fn one_that_is_not_answered_does_not_keep_the_others() {
        let question = |number, pause_ms| After { number, pause_ms };
        let questions =
            [question(2, 0), question(4, 60_000), question(3, 0), question(6, 0), question(8, 60_000)];
        let begin = Instant::now();
        let answers = ask_within(&questions, Duration::from_millis(300));
        assert!(begin.elapsed() < Duration::from_secs(30));
        let of = |answer: &io::Result<u64>| answer.as_ref().map_err(io::Error::kind).copied();
        let timed_out = Err(io::ErrorKind::TimedOut);
        let expected = [Ok(2), timed_out, Err(io::ErrorKind::NotFound), Ok(6), timed_out];
        assert_eq!(answers.iter().map(of).collect::<Vec<_>>(), expected);
    }

    /// Answers with the first descriptor from 3 on that is open, and is not the pipe.
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
    fn the_child_holds_nothing_of_its_parent() {
        let _held = tempfile::tempfile().unwrap();
        assert_eq!(ask(&[Inherited])[0].as_ref().unwrap(), &1, "its pipe");
    }
}
