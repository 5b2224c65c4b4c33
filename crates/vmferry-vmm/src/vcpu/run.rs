//! The life of a vCPU thread.

use std::sync::atomic::Ordering;

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmferry_dirty::log::KvmDirtyRing;

use super::Vcpu;
use super::gate::{Gate, GuestRequest, Pass};
use crate::devices::{Bus, WriteEffect};

pub(super) fn run(vcpu: &Vcpu, gate: &Gate, bus: &Bus, ring: Option<&KvmDirtyRing>) {
    let forget_kicks = || vcpu.immediate_exit.get().store(0, Ordering::SeqCst);
    while gate.pass(forget_kicks) == Pass::Run {
        let request = stay_in_guest(vcpu, &mut vcpu.lock().fd, bus, ring);
        if let Some(request) = request {
            gate.request(request);
        }
    }
}

/// Runs guest code until a kick, or until the machine has to act.
///
/// After an I/O exit KVM completes the guest's instruction on the next KVM_RUN only, so the saved state of a
/// vCPU is whole only after one more. That is why nothing but a KVM_RUN that was interrupted ends the stay: a
/// kick that arrives during I/O leaves `immediate_exit` set, and the next KVM_RUN completes the instruction
/// and returns at once.
fn stay_in_guest(
    vcpu: &Vcpu,
    fd: &mut VcpuFd,
    bus: &Bus,
    ring: Option<&KvmDirtyRing>,
) -> Option<GuestRequest> {
    let mut request = None;
    loop {
        let broken = match fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                bus.port_read(port, data);
                continue;
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                leave_for(bus.port_write(port, data), vcpu, &mut request);
                continue;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                bus.mmio_read(address, data);
                continue;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                leave_for(bus.mmio_write(address, data), vcpu, &mut request);
                continue;
            }
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                match ring.map(KvmDirtyRing::make_room) {
                    Some(Ok(())) => continue,
                    Some(Err(e)) => format!("its dirty ring is full: {e}"),
                    None => "it has a full dirty ring, and should have none".to_owned(),
                }
            }
            Ok(VcpuExit::Intr) => return request,
            Ok(VcpuExit::Shutdown) => return Some(GuestRequest::Reset),
            Ok(VcpuExit::InternalError) => "KVM could not emulate an instruction".to_owned(),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                format!("the CPU refused to enter the guest (reason {reason:#x} on CPU {cpu})")
            }
            Ok(exit) => format!("unexpected exit {exit:?}"),
            Err(e) if e.errno() == libc::EINTR => return request,
            // A vCPU that waited for its start-up interrupt has got it.
            Err(e) if e.errno() == libc::EAGAIN => continue,
            Err(e) => format!("KVM_RUN failed: {e}"),
        };
        return Some(GuestRequest::InternalError {
            vcpu: vcpu.index,
            reason: format!("{broken}; {}", registers(fd)),
        });
    }
}

/// Has the vCPU leave the guest if a write calls for the machine, but only by way of the KVM_RUN that completes
/// the writing instruction.
fn leave_for(effect: WriteEffect, vcpu: &Vcpu, request: &mut Option<GuestRequest>) {
    *request = match effect {
        WriteEffect::Nothing => return,
        WriteEffect::Reset => Some(GuestRequest::Reset),
        WriteEffect::PowerOff => Some(GuestRequest::PowerOff),
    };
    vcpu.immediate_exit.get().store(1, Ordering::SeqCst);
}

/// Where the vCPU is, for a human.
fn registers(fd: &VcpuFd) -> String {
    match (fd.get_regs(), fd.get_sregs()) {
        (Ok(regs), Ok(sregs)) => format!(
            "rip={:#x} rsp={:#x} rflags={:#x} cs={:#x} cpl={} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} \
             efer={:#x}",
            regs.rip,
            regs.rsp,
            regs.rflags,
            sregs.cs.selector,
            sregs.cs.dpl,
            sregs.cr0,
            sregs.cr2,
            sregs.cr3,
            sregs.cr4,
            sregs.efer
        ),
        _ => "its registers cannot be read".to_owned(),
    }
}
