//! What this machine could do at best: memory copied over loopback TCP, with no VMM in between.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use vmferry_bench::host::Host;
use vmferry_bench::median::Median;

/// What the case `idle` of `peers` has to send.
const BYTES: usize = 1536 << 20;

/// Bytes a read or a write.
const CHUNK: usize = 1 << 20;

/// Without progress for so long, something is broken.
const PATIENCE: Duration = Duration::from_secs(30);

/// Measures how fast 1.5 GiB get through loopback TCP into memory: upper bounds for a migration.
#[derive(Debug, Parser)]
#[command(max_term_width = 100)]
struct Options {
    /// Measurements of each kind
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
}

fn main() -> ExitCode {
    match measure(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("transfer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options) -> anyhow::Result<()> {
    println!("host     {}", Host::this());
    let mut source = Memory::new(BYTES)?;
    source.populate();
    let mut populated = Memory::new(BYTES)?;
    populated.populate();
    let (mut into_populated, mut into_fresh) = (Vec::new(), Vec::new());
    // In turn, as what else the machine does comes and goes.
    for _ in 0..options.runs {
        into_populated.push(copy(source.bytes(), populated.bytes())?);
        into_fresh.push(copy(source.bytes(), Memory::new(BYTES)?.bytes())?);
    }
    print("into populated memory", into_populated);
    print("into fresh memory", into_fresh);
    Ok(())
}

fn print(name: &str, times: Vec<Duration>) {
    let speeds = times
        .iter()
        .map(|time| BYTES as f64 / time.as_secs_f64() / 1e9);
    if let Some(Median { median, min, max }) = Median::of(speeds) {
        println!("{name:22} {median:5.2} GB/s [{min:.2}, {max:.2}]");
    }
}

/// Sends all of `from` over loopback TCP into `to`.
fn copy(from: &[u8], to: &mut [u8]) -> anyhow::Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen on loopback")?;
    let address = listener.local_addr()?;
    let mut sender = TcpStream::connect(address).context("cannot connect over loopback")?;
    let (mut receiver, _) = listener.accept()?;
    sender.set_write_timeout(Some(PATIENCE))?;
    receiver.set_read_timeout(Some(PATIENCE))?;
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || -> std::io::Result<()> {
            from.chunks(CHUNK)
                .try_for_each(|chunk| sender.write_all(chunk))
        });
        let received = to
            .chunks_mut(CHUNK)
            .try_for_each(|chunk| receiver.read_exact(chunk));
        // Closed, so that a sender that is still at work ends too.
        drop(receiver);
        let sent = sending.join();
        received.context("cannot receive")?;
        let sent = sent.ok().context("the sender panicked")?;
        sent.context("cannot send")
    })?;
    let time = begin.elapsed();
    ensure!(
        from[from.len() - 1] == to[to.len() - 1],
        "what arrived is not what was sent"
    );
    Ok(time)
}

/// Private anonymous memory, with transparent huge pages advised, as that of a guest.
struct Memory {
    start: *mut u8,
    length: usize,
}

impl Memory {
    /// Memory that is not there until it is touched.
    fn new(length: usize) -> anyhow::Result<Self> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping at an address that the system chooses concerns nobody else.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), length, protection, flags) }
            .context("cannot map memory")?;
        let memory = Memory {
            start: start.cast(),
            length,
        };
        // SAFETY: the range is the mapping just made; the advice changes no content.
        unsafe { madvise(start, length, Advice::LinuxHugepage) }
            .context("cannot advise huge pages")?;
        Ok(memory)
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `start` and `length` are those of a mapping that lives as long as `self`, is readable,
        // writable and zero at first, and is reached through the exclusively borrowed `self` only.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }

    /// Writes to all of it, so that the host has to give it.
    fn populate(&mut self) {
        self.bytes().fill(0x5a);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and no slice of it outlives the value.
        let _ = unsafe { munmap(self.start.cast(), self.length) };
    }
}
