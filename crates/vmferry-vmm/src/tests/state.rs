//! Everything that KVM keeps of a guest goes from one machine to another: it is set through KVM here, moved, and read through
//! KVM there. What a payload guest cannot see of itself is tested here, too.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_MP_STATE_HALTED, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT, Xsave, kvm_debugregs, kvm_irqchip, kvm_lapic_state,
    kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use vmferry_engine::seam::{Activity, DeviceState, Guest};
use vmm_sys_util::fam::FamStruct;

use super::migration::{copy_ram, incoming};
use super::*;
use crate::RunState;
use crate::state::clock;
use crate::state::cpu::{self, CpuState};
use crate::state::irqchip::{IRQCHIP, IrqchipState};
use crate::state::msrs;
use crate::vcpu::GuestRequest;

/// One MSR of each class, with a value that it does not have at power-on.
const MSRS: &[(u32, u64)] = &[
    (0x174, 0x10),                        // IA32_SYSENTER_CS
    (0x175, 0xffff_8000_1234_0000),       // IA32_SYSENTER_ESP
    (0x176, 0xffff_8000_1234_1000),       // IA32_SYSENTER_EIP
    (0xc000_0081, 0x0023_0010_0000_0000), // STAR
    (0xc000_0082, 0xffff_8000_1234_2000), // LSTAR
    (0xc000_0084, 0x4_7700),              // SFMASK
    (0xc000_0102, 0xffff_8000_1234_3000), // KERNEL_GS_BASE
    (0x277, 0x0007_0406_0001_0406),       // PAT
    (0x1a0, 0x801),                       // IA32_MISC_ENABLE
    (0x3b, 0),                            // TSC_ADJUST: set with the counters
    (0x4b56_4d00, 0x3000),                // kvmclock: the wall clock
    (0x202, 0x8000_0006),                 // an MTRR of each class
    (0x203, 0xfff_8000_0800),
    (0x250, 0x0606_0606_0606_0606),
    (0x268, 0x0505_0505_0505_0505),
    (0x2ff, 0xc06),
    (0x17a, 0x5),      // IA32_MCG_STATUS
    (0x404, u64::MAX), // a bank of machine checks
    (0x405, 0xb200_0000_0000_0175),
    (0x406, 0xdead_b000),
    (0x407, 0x86),
];

/// What KVM shows of a vCPU.
struct Seen {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    mp_state: u32,
    xsave: Vec<u32>,
    msrs: Vec<(u32, u64)>,
    lapic: kvm_lapic_state,
}

fn xsave(machine: &Machine, vcpu: usize) -> Xsave {
    let mut xsave = Xsave::new(machine.hypervisor.features.xsave_extra).unwrap();
    // SAFETY: the buffer has the size that KVM names for this machine.
    unsafe { machine.vcpus[vcpu].lock().fd.get_xsave2(&mut xsave) }.unwrap();
    xsave
}

fn see(machine: &Machine, vcpu: usize) -> Seen {
    let xsave = xsave(machine, vcpu);
    let xsave = xsave.as_fam_struct_ref();
    let words = xsave.xsave.region.iter().chain(xsave.as_slice());
    let xsave = words.copied().collect();
    let inner = machine.vcpus[vcpu].lock();
    let fd = &inner.fd;
    Seen {
        mp_state: fd.get_mp_state().unwrap().mp_state,
        events: fd.get_vcpu_events().unwrap(),
        regs: fd.get_regs().unwrap(),
        sregs: fd.get_sregs().unwrap(),
        xcrs: fd.get_xcrs().unwrap(),
        debug: fd.get_debug_regs().unwrap(),
        xsave,
        msrs: msrs::read(fd, &machine.msrs)
            .unwrap()
            .iter()
            .map(|msr| (msr.index, msr.data))
            .collect(),
        lapic: fd.get_lapic().unwrap(),
    }
}

/// The extended components that the guest's CPUID names.
fn components(machine: &Machine) -> u64 {
    let leaf = machine.offers.cpuid.iter();
    let leaf = leaf.clone().find(|e| (e.function, e.index) == (0xd, 0));
    leaf.map_or(3, |e| u64::from(e.edx) << 32 | u64::from(e.eax))
}

/// Sets all of a vCPU to what it is not at power-on.
fn mark(machine: &Machine, vcpu: usize) {
    let mask = components(machine);
    let saved = machine.msrs.clone();
    let features = machine.hypervisor.features;
    let mut x = xsave(machine, vcpu);
    // SAFETY: the length of the flexible part stays as it is.
    let inner = unsafe { x.as_mut_fam_struct() };
    let set = |region: &mut [u32], from: usize, bytes: usize, seed: u32| {
        for (i, word) in region[from / 4..(from + bytes) / 4].iter_mut().enumerate() {
            *word = seed
                .wrapping_mul(0x9e37_79b9)
                .wrapping_add(i as u32 + vcpu as u32 * 1000);
        }
    };
    set(&mut inner.xsave.region, 160, 256, 1); // XMM0 to XMM15
    for entry in machine.offers.cpuid.iter().filter(|e| e.function == 0xd) {
        // AVX, and of AVX-512 the mask registers and both halves of ZMM.
        if [2, 5, 6, 7].contains(&entry.index) && mask & 1 << entry.index != 0 {
            let (from, bytes) = (entry.ebx as usize, entry.eax as usize);
            set(&mut inner.xsave.region, from, bytes, entry.index);
        }
    }
    inner.xsave.region[128] |= mask as u32 & 0xe7;
    let inner = machine.vcpus[vcpu].lock();
    let fd = &inner.fd;
    // SAFETY: as for reading.
    unsafe { fd.set_xsave2(&x) }.unwrap();
    let mut xcrs = fd.get_xcrs().unwrap();
    xcrs.xcrs[0].value = mask & 0xe7;
    fd.set_xcrs(&xcrs).unwrap();

    let mut sregs = fd.get_sregs().unwrap();
    sregs.cr2 = 0x1234_5000;
    sregs.cr8 = 3;
    sregs.fs.base = 0x7fff_1234_5000;
    sregs.gs.base = 0x7fff_1234_6000;
    fd.set_sregs(&sregs).unwrap();
    let mut regs = fd.get_regs().unwrap();
    (regs.rax, regs.r15, regs.rip) = (0x1111, 0xffff_0000_1234_5678, 0x10_0042);
    fd.set_regs(&regs).unwrap();
    fd.set_debug_regs(&kvm_debugregs {
        db: [0x1000, 0x2000, 0x3000, 0x4000],
        dr6: 0xffff_0ff1,
        dr7: 0x0030_0403,
        ..Default::default()
    })
    .unwrap();
    let wanted: Vec<_> = MSRS
        .iter()
        .map(|&(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    msrs::write(fd, &wanted, &saved).unwrap();
    let mut lapic = fd.get_lapic().unwrap();
    let mut register = |at: usize, value: u32| {
        for (to, byte) in lapic.regs[at..at + 4].iter_mut().zip(value.to_le_bytes()) {
            *to = byte as _;
        }
    };
    register(0xd0, 0x0200_0000); // logical destination
    register(0xf0, 0x1ff); // on
    register(0x120, 1 << 5); // in service: 0x25
    register(0x210, 1 << 9); // requested: 0x29
    register(0x320, 0x2_0041); // the timer: periodic,
    register(0x3e0, 0xb); // undivided,
    register(0x380, 0x7fff_ffff); // for a second or two
    fd.set_lapic(&lapic).unwrap();
    let mut events = fd.get_vcpu_events().unwrap();
    events.exception.injected = 1;
    events.exception.nr = 13;
    events.exception.has_error_code = 1;
    events.exception.error_code = 0x42;
    events.nmi.pending = 1;
    events.nmi.masked = 1;
    events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
    if features.triple_fault_event {
        events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        events.triple_fault.pending = u8::from(vcpu == 0);
    }
    fd.set_vcpu_events(&events).unwrap();
    if vcpu > 0 {
        fd.set_mp_state(kvm_bindings::kvm_mp_state {
            mp_state: KVM_MP_STATE_HALTED,
        })
        .unwrap();
    }
}

fn io_apic(machine: &Machine) -> kvm_irqchip {
    let mut chip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..Default::default()
    };
    machine.hypervisor.vm.get_irqchip(&mut chip).unwrap();
    chip
}

fn pit(machine: &Machine) -> kvm_pit_state2 {
    machine.hypervisor.vm.get_pit2().unwrap()
}

/// What a stopped machine's state is in a stream.
fn save(machine: &Machine) -> Vec<DeviceState> {
    Guest::pause(machine, PATIENCE).unwrap();
    machine.save_devices().unwrap()
}

/// Moves a guest that stands still.
fn hand_over(source: &Machine, destination: &Machine) {
    destination
        .check_description(&source.describe().unwrap())
        .unwrap();
    let state = save(source);
    copy_ram(source, destination);
    destination.load_devices(&state).unwrap();
    destination.start(Activity::Paused, Duration::ZERO).unwrap();
}

#[test]
fn all_that_kvm_keeps_of_a_vcpu_arrives() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, _) = machine(config(2, &dir.path().join("here")));
    let (destination, _) = machine(incoming(2, &dir.path().join("there")));
    let before: Vec<_> = (0..2).map(|vcpu| see(&source, vcpu)).collect();
    for vcpu in 0..2 {
        mark(&source, vcpu);
    }
    let here: Vec<_> = (0..2).map(|vcpu| see(&source, vcpu)).collect();
    hand_over(&source, &destination);
    for (vcpu, (here, before)) in here.iter().zip(&before).enumerate() {
        let there = see(&destination, vcpu);
        // It can only have been moved if it is not what a new vCPU has.
        assert_eq!(there.regs, here.regs);
        assert_ne!(there.regs, before.regs);
        assert_eq!(there.sregs, here.sregs);
        assert_ne!(there.sregs, before.sregs);
        assert_eq!(there.xcrs.xcrs[0].value, here.xcrs.xcrs[0].value);
        assert_eq!(here.xcrs.xcrs[0].value, components(&source) & 0xe7);
        assert_eq!(there.debug, here.debug);
        assert_ne!(there.debug, before.debug);
        assert_eq!(there.events, here.events);
        assert_ne!(there.events, before.events);
        assert_eq!(there.mp_state, here.mp_state);
        assert!(
            there.xsave == here.xsave,
            "extended registers of vCPU {vcpu}"
        );
        assert!(there.xsave[..1024] != before.xsave[..1024]);
        assert_eq!(there.msrs, here.msrs);
        for &(index, data) in MSRS {
            if machine_saves(&source, index) {
                assert!(there.msrs.contains(&(index, data)), "MSR {index:#x}");
            } else {
                eprintln!("SKIPPED: this host's KVM has no MSR {index:#x}");
            }
        }
        // All but the count of the timer, which goes on.
        for at in (0..0x400).step_by(16).filter(|at| *at != 0x390) {
            let register = |seen: &Seen| seen.lapic.regs[at..at + 4].to_vec();
            assert_eq!(register(&there), register(here), "local APIC, {at:#x}");
        }
        let count = u32::from_le_bytes(std::array::from_fn(|i| there.lapic.regs[0x390 + i] as u8));
        assert!(
            count > 0,
            "the timer of the local APIC of vCPU {vcpu} stands"
        );
    }
}

fn machine_saves(machine: &Machine, msr: u32) -> bool {
    machine.msrs.contains(&msr)
}

#[test]
fn interrupt_controllers_and_timer_arrive() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, _) = machine(config(1, &dir.path().join("here")));
    let (destination, _) = machine(incoming(1, &dir.path().join("there")));
    let vm = &source.hypervisor.vm;
    let mut chip = io_apic(&source);
    // SAFETY: KVM has filled this member of the union.
    unsafe { chip.chip.ioapic.redirtbl[11].bits = 0x0100_0000_0001_a04b };
    vm.set_irqchip(&chip).unwrap();
    let mut timer = pit(&source);
    timer.channels[0].count = 0x1234;
    timer.channels[0].mode = 2;
    timer.channels[0].rw_mode = 3;
    timer.channels[2].count = 0x4321;
    vm.set_pit2(&timer).unwrap();
    hand_over(&source, &destination);
    // SAFETY: as above.
    let entry = unsafe { io_apic(&destination).chip.ioapic.redirtbl[11].bits };
    assert_eq!(entry, 0x0100_0000_0001_a04b);
    let there = pit(&destination);
    for (there, here) in there.channels.iter().zip(&timer.channels) {
        assert_eq!(
            (there.count, there.mode, there.rw_mode),
            (here.count, here.mode, here.rw_mode)
        );
    }
}

#[test]
fn the_counters_of_all_vcpus_stay_as_far_apart_as_they_are() {
    if !kvm() {
        return;
    }
    const AHEAD: u64 = 1 << 42;
    let dir = tempfile::tempdir().unwrap();
    let (source, _) = machine(config(3, &dir.path().join("here")));
    let (destination, _) = machine(incoming(3, &dir.path().join("there")));
    let tsc = |machine: &Machine, vcpu: usize| {
        let inner = machine.vcpus[vcpu].lock();
        msrs::read(&inner.fd, &[msrs::IA32_TSC]).unwrap()[0].data
    };
    // KVM takes a counter that is written for an attempt to keep it with the others, so the offsets are set.
    let offset = clock::tsc_offset(&source.vcpus[0].lock().fd).unwrap();
    for vcpu in 1..3 {
        let apart = offset.wrapping_add(AHEAD * vcpu as u64);
        clock::set_tsc_offset(&source.vcpus[vcpu].lock().fd, apart).unwrap();
    }
    let first = tsc(&source, 0);
    if tsc(&source, 1).wrapping_sub(first) < AHEAD / 2 {
        eprintln!(
            "SKIPPED: this KVM gives every vCPU the host's time stamp counter, whatever its offset"
        );
        return;
    }
    hand_over(&source, &destination);
    let first = tsc(&destination, 0);
    for vcpu in 1..3 {
        let ahead = tsc(&destination, vcpu).wrapping_sub(first);
        let wanted = AHEAD * vcpu as u64;
        assert!(
            ahead.abs_diff(wanted) < 1 << 38,
            "vCPU {vcpu} is {ahead:#x} ahead"
        );
    }
}

#[test]
fn a_reset_clears_memory_types_and_machine_checks() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (machine, _) = machine(config(1, &dir.path().join("here")));
    let before = see(&machine, 0);
    mark(&machine, 0);
    machine.reset().unwrap();
    let after = see(&machine, 0);
    assert_eq!(after.msrs, before.msrs);
    assert_eq!(after.debug, before.debug);
    assert_eq!(after.events, before.events);
    assert_eq!(after.xcrs.xcrs[0].value, before.xcrs.xcrs[0].value);
    for index in [0x202, 0x2ff, 0x405] {
        assert!(
            machine_saves(&machine, index),
            "MSR {index:#x} is not known to this KVM"
        );
    }
}

#[test]
fn a_paused_guest_that_cannot_go_on_arrives_as_such() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, _) = machine(config(1, &dir.path().join("here")));
    let (destination, events) = machine(incoming(1, &dir.path().join("there")));
    let broken = GuestRequest::InternalError {
        vcpu: 0,
        reason: "KVM could not emulate an instruction".into(),
    };
    source.gate.set_pending(Some(broken));
    hand_over(&source, &destination);
    destination.resume().unwrap();
    expect(&events, &MachineEvent::Resume);
    expect(&events, &MachineEvent::Stop);
    let told = events.recv_timeout(PATIENCE).unwrap();
    assert!(
        matches!(told, MachineEvent::InternalError { vcpu: 0, .. }),
        "{told:?}"
    );
    assert_eq!(destination.run_state(), RunState::InternalError);
}

#[test]
fn a_pending_triple_fault_resets_the_guest_where_it_arrives() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, _) = machine(config(1, &dir.path().join("here")));
    if !source.hypervisor.features.triple_fault_event {
        eprintln!("SKIPPED: this KVM has no KVM_CAP_X86_TRIPLE_FAULT_EVENT");
        return;
    }
    let (destination, events) = machine(incoming(1, &dir.path().join("there")));
    {
        let inner = source.vcpus[0].lock();
        let mut pending = inner.fd.get_vcpu_events().unwrap();
        pending.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        pending.triple_fault.pending = 1;
        inner.fd.set_vcpu_events(&pending).unwrap();
    }
    hand_over(&source, &destination);
    destination.resume().unwrap();
    expect(&events, &MachineEvent::Resume);
    expect(&events, &MachineEvent::Reset { guest: true });
}

/// Why a destination refuses the state of a guest of two vCPUs in which vCPU 1 was changed.
fn refusal_of(
    state: &[DeviceState],
    destination: &Machine,
    change: impl FnOnce(&mut CpuState),
) -> String {
    let mut state = state.to_vec();
    let section = state
        .iter_mut()
        .find(|s| s.idstr == cpu::SECTION.name && s.instance_id == 1)
        .unwrap();
    let mut vcpu: CpuState = cpu::SECTION.decode(section).unwrap();
    change(&mut vcpu);
    *section = cpu::SECTION.encode(1, &vcpu).unwrap();
    let error = destination.load_devices(&state).unwrap_err();
    // Nothing of it was loaded, not even into the vCPU whose own state is in order.
    let first = &destination.vcpus[0].lock();
    assert_eq!(
        first.fd.get_regs().unwrap().r15,
        0,
        "vCPU 0 was loaded before: {error}"
    );
    error.to_string()
}

#[test]
fn what_the_machine_does_not_offer_cannot_be_switched_on() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, _) = machine(config(2, &dir.path().join("here")));
    let (destination, _) = machine(incoming(2, &dir.path().join("there")));
    for vcpu in 0..2 {
        mark(&source, vcpu);
    }
    let state = save(&source);
    let leaf = |vcpu: &mut CpuState, leaf: u32, subleaf: u32| {
        let place = |e: &kvm_bindings::kvm_cpuid_entry2| (e.function, e.index) == (leaf, subleaf);
        vcpu.cpuid
            .iter()
            .position(place)
            .expect("KVM has this leaf")
    };
    type Change<'a> = Box<dyn Fn(&mut CpuState) + 'a>;
    let cases: Vec<(&str, Change)> = vec![
        (
            "CPUID of vCPU 1: this host does not offer leaf 0x1 subleaf 0 ECX bits 0x00000020",
            Box::new(|vcpu| {
                let at = leaf(vcpu, 1, 0);
                vcpu.cpuid[at].ecx |= 1 << 5;
            }),
        ),
        (
            "leaf 0x80000001 subleaf 0 ECX bits 0x00000004",
            Box::new(|vcpu| {
                let at = leaf(vcpu, 0x8000_0001, 0);
                vcpu.cpuid[at].ecx |= 1 << 2;
            }),
        ),
        (
            "leaf 0x0 subleaf 0 EBX",
            Box::new(|vcpu| {
                let at = leaf(vcpu, 0, 0);
                vcpu.cpuid[at].ebx ^= 1;
            }),
        ),
        (
            "leaf 0x1 subleaf 0 twice",
            Box::new(|vcpu| {
                let at = leaf(vcpu, 1, 0);
                vcpu.cpuid.push(vcpu.cpuid[at]);
            }),
        ),
        (
            "1000 entries",
            Box::new(|vcpu| {
                let last = vcpu.cpuid[0];
                vcpu.cpuid.resize(1000, last);
            }),
        ),
        (
            "EFER has bits 0x1000",
            Box::new(|vcpu| vcpu.sregs.efer |= 1 << 12),
        ),
        (
            "CR4 has bits 0x2000",
            Box::new(|vcpu| vcpu.sregs.cr4 |= 1 << 13),
        ),
        (
            "XCR0 has bits 0x60000",
            Box::new(|vcpu| vcpu.xcrs.xcrs[0].value |= 3 << 17),
        ),
        (
            "extended registers has bits 0x40000",
            Box::new(|vcpu| vcpu.xsave.region[128] |= 1 << 18),
        ),
        (
            "run state 77 is unknown",
            Box::new(|vcpu| vcpu.mp_state.mp_state = 77),
        ),
        (
            "MSR 0x480 has value 0x1",
            Box::new(|vcpu| {
                vcpu.msrs.push(kvm_msr_entry {
                    index: 0x480,
                    data: 1,
                    ..Default::default()
                });
            }),
        ),
        (
            "is there twice",
            Box::new(|vcpu| vcpu.msrs.push(vcpu.msrs[0])),
        ),
    ];
    for (words, change) in cases {
        let said = refusal_of(&state, &destination, change);
        assert!(said.contains(words), "{said}");
        assert!(
            said.contains("vCPU 1") || said.contains("(instance 1)"),
            "{said}"
        );
    }

    // An I/O APIC where no vmferry machine has one.
    let mut moved = state.clone();
    let section = moved.iter_mut().find(|s| s.idstr == IRQCHIP.name).unwrap();
    let base = 0xfec0_0000_u64.to_le_bytes();
    let at = section
        .data
        .windows(8)
        .position(|bytes| bytes == base)
        .unwrap();
    section.data[at + 1] = 0x10;
    assert!(IRQCHIP.decode::<IrqchipState>(section).is_ok());
    let said = destination.load_devices(&moved).unwrap_err().to_string();
    assert!(said.contains("I/O APIC is at 0xfec01000"), "{said}");

    // An MSR that this host does not have, as it is at power-on: nobody misses it.
    let mut vcpu: CpuState = cpu::SECTION.decode(&state[1]).unwrap();
    vcpu.msrs.push(kvm_msr_entry {
        index: 0x480,
        ..Default::default()
    });
    let mut newer = state.clone();
    newer[1] = cpu::SECTION.encode(1, &vcpu).unwrap();
    destination.load_devices(&newer).unwrap();
}

#[test]
fn local_apics_beyond_255_move() {
    if !kvm() {
        return;
    }
    const CPUS: u32 = 258;
    let dir = tempfile::tempdir().unwrap();
    let (source, _) = machine(config(CPUS, &dir.path().join("here")));
    let (destination, _) = machine(incoming(CPUS, &dir.path().join("there")));
    let last = CPUS as usize - 1;
    {
        let inner = source.vcpus[last].lock();
        let mut sregs = inner.fd.get_sregs().unwrap();
        sregs.apic_base |= 0xc00; // x2APIC mode
        inner.fd.set_sregs(&sregs).unwrap();
    }
    hand_over(&source, &destination);
    let lapic = destination.vcpus[last].lock().fd.get_lapic().unwrap();
    let id = u32::from_le_bytes(std::array::from_fn(|i| lapic.regs[0x20 + i] as u8));
    assert_eq!(id, last as u32);
}
