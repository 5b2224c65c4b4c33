//! What a signal does to a process that runs a guest.
//!
//! | signal | by default | here |
//! |---|---|---|
//! | SIGTERM, SIGINT, SIGHUP, SIGQUIT | ends the process (SIGQUIT: with a core dump) | the process ends in order; a second one, a second later, ends it at once |
//! | SIGXFSZ | ends it | nothing: the write that would make a file larger than `ulimit -f` fails, and so does what it was for: the snapshot, or the guest's request |
//! | SIGXCPU | ends it | nothing but a line in the log: the kernel ends the process at the hard limit of `ulimit -t` |
//! | SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM, SIGPROF, SIGIO, SIGPWR, SIGSTKFLT | ends it | nothing but a line in the log: nobody here asks for one |
//! | the first real-time signal | ends it | makes a vCPU leave the guest, which it enters again unless it was asked to stop |
//! | the other real-time signals | end it | nothing but a line in the log |
//! | SIGPIPE | ends it | nothing (Rust's runtime ignores it): the write fails |
//! | SIGTSTP, SIGTTIN, SIGTTOU, SIGSTOP | stops it | the same, until SIGCONT: the guest stands still with its process |
//! | SIGCHLD, SIGCONT, SIGURG, SIGWINCH | nothing | the same |
//! | SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP | ends it, with a core dump | the same: the program is broken, or somebody wants the dump |
//! | SIGKILL | ends it | the same |
//!
//! Signals that the parent has left ignored stay so: SIGHUP under `nohup`, SIGINT and SIGQUIT in the background of a
//! shell. So does one that a library has taken before `main`, as profilers take SIGPROF. SIGTERM always ends the
//! process; SIGCHLD is never ignored, or the status of an `exec:` command would be lost.
//!
//! The signals are blocked in all threads, and one thread waits for them: so none interrupts a system call. A command
//! that is started has no signal blocked (Rust's runtime sees to that), and none that is ignored because of us.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use vmferry_control::schema::ShutdownCause;

use super::Exit;

/// Signals that ask the process to end.
const END: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Signals that ask for nothing here. The real-time signals are too.
const NOTHING: [libc::c_int; 10] = [
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
    libc::SIGXCPU,
    libc::SIGXFSZ,
];

/// Signals may come in pairs, as SIGHUP from a terminal and from its shell.
const INSISTING: Duration = Duration::from_secs(1);

/// The signals that this process has taken, blocked in every thread that is started from here on.
pub struct Signals(libc::sigset_t);

impl Signals {
    /// Takes the signals. Call this before there is a second thread.
    pub fn take() -> Self {
        let real_time = libc::SIGRTMIN()..=libc::SIGRTMAX();
        let all = END.into_iter().chain(NOTHING).chain(real_time);
        let taken = all.filter(|&signal| signal == libc::SIGTERM || is_default(signal));
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset makes `set` valid, sigaddset changes a valid set by signals that exist.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in taken {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            set.assume_init()
        };
        // SAFETY: the set is valid. SIGCHLD gets the disposition that it has unless a parent has changed that; no thread
        // waits for children yet.
        unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut());
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        }
        Signals(set)
    }

    /// Starts the thread that waits for them, and tells `exit` of those that end the process.
    pub fn watch(self, exit: Sender<Exit>) -> anyhow::Result<()> {
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || self.wait(&exit))
            .context("cannot start the thread that waits for signals")?;
        Ok(())
    }

    fn wait(&self, exit: &Sender<Exit>) {
        let mut first: Option<Instant> = None;
        loop {
            // SAFETY: the set is valid, and nobody wants to know more than the signal's number.
            let signal = unsafe { libc::sigwaitinfo(&self.0, ptr::null_mut()) };
            if signal < 0 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    tracing::error!(%error, "cannot wait for signals");
                    return;
                }
            } else if END.contains(&signal) {
                if first.is_some_and(|first| first.elapsed() > INSISTING) {
                    // Whatever keeps the process, it ends.
                    std::process::exit(128 + signal);
                }
                first.get_or_insert_with(Instant::now);
                // The process may be ending already.
                let _ = exit.send(Exit::host(ShutdownCause::HostSignal));
            } else {
                tracing::warn!(signal, "a signal came that means nothing here");
            }
        }
    }
}

/// Returns whether the signal's action is the default one: neither a parent nor a library has changed it.
fn is_default(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: asks only, and fills in `action` if it succeeds.
    unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_DFL
    }
}
