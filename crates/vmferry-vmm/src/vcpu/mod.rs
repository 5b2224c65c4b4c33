//! vCPUs: one thread each, in the guest as much as possible.

use std::io;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once};
use std::thread::{self, JoinHandle};

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use kvm_ioctls::{VcpuFd, VmFd};
use vmferry_dirty::log::KvmDirtyRing;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

use crate::devices::Bus;
use crate::error::{Attempt, MachineError};

mod gate;
mod run;

pub(crate) use gate::{Gate, GuestRequest, Pass, Wanted};

/// A vCPU. Its thread holds the lock of `inner` while it runs guest code, and lets go of it at the gate.
pub(crate) struct Vcpu {
    /// Its number, which is its APIC id too.
    pub index: u32,
    inner: Mutex<Inner>,
    immediate_exit: ImmediateExit,
    thread_id: AtomicI32,
}

/// A vCPU's KVM handle and what was given to it.
pub(crate) struct Inner {
    pub fd: VcpuFd,
    cpuid: Vec<kvm_cpuid_entry2>,
}

/// The byte of a vCPU's shared page that makes KVM_RUN return at once.
struct ImmediateExit(*mut u8);

// SAFETY: the byte is only accessed atomically (see `get`).
unsafe impl Send for ImmediateExit {}
// SAFETY: as for Send.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn get(&self) -> &AtomicU8 {
        // SAFETY: the page is mapped for as long as the VcpuFd lives, which is beside this value in Vcpu. KVM
        // only reads the byte, and this crate touches it nowhere else.
        unsafe { AtomicU8::from_ptr(self.0) }
    }
}

impl Vcpu {
    /// Creates vCPU `index` of `vm` with the given CPUID.
    pub fn new(vm: &VmFd, index: u32, cpuid: Vec<kvm_cpuid_entry2>) -> Result<Self, MachineError> {
        let mut fd = vm.create_vcpu(index.into()).attempt("create a vCPU")?;
        let immediate_exit = ImmediateExit(&raw mut fd.get_kvm_run().immediate_exit);
        let mut inner = Inner {
            fd,
            cpuid: Vec::new(),
        };
        inner.set_cpuid(cpuid)?;
        Ok(Vcpu {
            index,
            inner: Mutex::new(inner),
            immediate_exit,
            thread_id: AtomicI32::new(0),
        })
    }

    /// The vCPU's handle. Waits while the vCPU runs: hold it at the gate first.
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("a vCPU thread does not panic")
    }

    /// The kernel's number of the vCPU's thread.
    pub fn thread_id(&self) -> i32 {
        self.thread_id.load(Ordering::Relaxed)
    }
}

impl Inner {
    /// The CPUID that the vCPU has.
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// Gives the vCPU another CPUID. KVM allows no change once it has run, so an equal one is not set again.
    pub fn set_cpuid(&mut self, cpuid: Vec<kvm_cpuid_entry2>) -> Result<(), MachineError> {
        if self.cpuid == cpuid {
            return Ok(());
        }
        let table = CpuId::from_entries(&cpuid).map_err(|_| {
            MachineError::Misfit(format!(
                "a CPUID table of {} entries is too long",
                cpuid.len()
            ))
        })?;
        self.fd
            .set_cpuid2(&table)
            .attempt("give a vCPU its CPUID")?;
        self.cpuid = cpuid;
        Ok(())
    }
}

/// A running vCPU thread.
pub(crate) struct VcpuThread {
    vcpu: Arc<Vcpu>,
    handle: JoinHandle<()>,
}

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl VcpuThread {
    /// Starts the thread of `vcpu`; it waits at the gate. `ring` is the dirty log if it is one of rings.
    pub fn spawn(
        machine: &str,
        vcpu: Arc<Vcpu>,
        gate: Arc<Gate>,
        bus: Arc<Bus>,
        ring: Option<KvmDirtyRing>,
    ) -> Result<Self, MachineError> {
        // The handler does nothing: that the signal arrives is what ends KVM_RUN.
        static HANDLER: Once = Once::new();
        let mut registered = Ok(());
        HANDLER.call_once(|| registered = register_signal_handler(SIGRTMIN(), kicked));
        registered.attempt("be interrupted by a signal")?;

        let name = format!("CPU {}/KVM", vcpu.index);
        let of_thread = vcpu.clone();
        let handle = thread::Builder::new()
            .name(name)
            .spawn(move || {
                // SAFETY: gettid has no preconditions.
                let id = unsafe { libc::gettid() };
                of_thread.thread_id.store(id, Ordering::Relaxed);
                // Whoever started this thread, or this process, may have blocked it.
                if let Err(error) = unblock_signal(SIGRTMIN()) {
                    tracing::error!(?error, "a vCPU cannot be interrupted by a signal");
                }
                run::run(&of_thread, &gate, &bus, ring.as_ref());
            })
            .map_err(|source: io::Error| MachineError::Os {
                action: format!("start the thread of vCPU {} of '{machine}'", vcpu.index),
                source,
            })?;
        Ok(VcpuThread { vcpu, handle })
    }

    /// Makes the thread leave the guest, if it is there, and come to the gate.
    pub fn kick(&self) {
        // The byte catches a thread that is about to enter the guest, the signal one that is inside.
        self.vcpu.immediate_exit.get().store(1, Ordering::SeqCst);
        if let Err(error) = self.handle.kill(SIGRTMIN()) {
            tracing::error!(vcpu = self.vcpu.index, %error, "cannot signal a vCPU thread");
        }
    }

    /// Waits for the thread's end.
    pub fn join(self) {
        if self.handle.join().is_err() {
            tracing::error!(vcpu = self.vcpu.index, "a vCPU thread has panicked");
        }
    }
}
