# From the PVH entry to ring 3, and all other ring-0 code there is: the processor's set-up, the
# exception stubs, one service for ring 3, and two interrupt handlers. It is short on purpose: some hosts emulate ring 0 at about a
# million instructions a second and run ring 3 natively, so everything else is Rust in ring 3.
#
# Selectors: 0x08 code, 32 bits; 0x10 code, 64 bits; 0x18 data; 0x23 data, ring 3; 0x2b code,
# 64 bits, ring 3; 0x30 + 16 * n the TSS of processor n.

.section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18                  # sizes of name and value; XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start

.section .text.entry, "ax"

# The boot processor starts here, in 32-bit protected mode without paging, %ebx = hvm_start_info.
.code32
.globl pvh_start
pvh_start:
    cli
    cld
    movl %ebx, start_info
    lgdt gdt_pointer
    ljmp $0x08, $protected_mode

# All processors: page tables, SSE, long mode.
protected_mode:
    movw $0x18, %ax
    movw %ax, %ss
    movw $0x23, %ax
    movw %ax, %ds
    movw %ax, %es
    movl $0x620, %eax               # CR4: PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $boot_pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx          # EFER: LME
    movl $0x100, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x80000033, %eax          # CR0: PE, MP, ET, NE, PG; EM and TS clear, so SSE works
    movl %eax, %cr0
    ljmp $0x10, $long_mode

# Each processor takes the next number and with it a block of memory: from its top down the TSS,
# the ring-0 stack, and the ring-3 stack.
.code64
long_mode:
    movl $1, %edi
    lock xaddl %edi, processors
    cmpl ${MAX_CPUS}, %edi
    jae park
    lidt idt_pointer
    movl %edi, %eax
    shll ${CPU_BLOCK_SHIFT}, %eax
    leal cpu_blocks + {CPU_BLOCK} - {TSS}(%rax), %eax   # the TSS
    movq %rax, 4(%rax)              # rsp0: the ring-0 stack ends where the TSS begins
    movw $104, 102(%rax)            # then the I/O bitmap: ring 3 may use ports 0 to 0x3ff. (Not
    movb $0xff, 232(%rax)           # IOPL 3: KVM/PVM forgets it)

    movl %eax, %ecx                 # the TSS descriptor: limit 232, base %eax, type 0x89
    andl $0x00ffffff, %ecx
    shlq $16, %rcx
    movabsq $0x00008900000000e8, %rdx
    orq %rdx, %rcx
    movl %eax, %edx
    andl $0xff000000, %edx
    shlq $32, %rdx
    orq %rdx, %rcx
    movl %edi, %edx
    shll $4, %edx
    movq %rcx, gdt + 0x30(%rdx)
    addl $0x30, %edx
    ltr %dx

    movq %rax, %rsp
    subl ${RING0_STACK} + 8, %eax   # as if cpu_main had been called: 8 below a multiple of 16
    movl start_info, %esi
    pushq $0x23
    pushq %rax
    pushq $2                        # interrupts off
    pushq $0x2b
    pushq ${cpu_main}
    iretq

park:
    cli
    hlt
    jmp park

# What an application processor runs after the start-up IPI: real mode, copied to TRAMPOLINE.
.code16
.globl trampoline_start
trampoline_start:
    cli
    movw %cs, %ax
    movw %ax, %ds
    lgdtl trampoline_gdt_pointer - trampoline_start
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $0x08, $protected_mode
    .balign 4
trampoline_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
.globl trampoline_end
trampoline_end:

# Exceptions: 32 stubs, 16 bytes each, that push the vector below the error code (0 where the
# processor pushes none) and go on in ring 3, on that processor's emptied stack.
.code64
    .balign 16
.globl exception_stubs
exception_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    .if !((vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21))
    pushq $0
    .endif
    pushq $vector
    jmp exception
    .set vector, vector + 1
    .endr

exception:
    movq (%rsp), %rdi               # vector
    movq 8(%rsp), %rsi              # error code
    movq 16(%rsp), %rdx             # rip
    movq %cr2, %rcx
    movq %rsp, %rax
    andq $-{CPU_BLOCK}, %rax
    addq ${CPU_BLOCK} - {TSS} - {RING0_STACK} - 8, %rax
    pushq $0x23
    pushq %rax
    pushq $2
    pushq $0x2b
    pushq ${exception_main}
    iretq

# The service: with %edi = 0 it writes %edx:%eax to the model-specific register %esi, with 1 it sleeps
# until an interrupt has been taken. Ring 3 calls it by a breakpoint, the one kind of call that
# KVM/PVM knows: there, INT n is an invalid instruction, and SYSCALL stays in ring 3.
.globl breakpoint
breakpoint:
    testl %edi, %edi
    jnz 1f
    movl %esi, %ecx
    wrmsr
    iretq
1:  sti
    hlt
    cli
    iretq

.globl interrupt_timer
interrupt_timer:                    # the local APIC timer: only the end of interrupt
    pushq %rax
    movl ${LAPIC} + 0xb0, %eax
    movl $0, (%rax)
    popq %rax
    iretq

.globl interrupt_spurious
interrupt_spurious:
    iretq

.section .data.entry, "aw"
    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cff3000000ffff
    .quad 0x00affb000000ffff
    .fill {MAX_CPUS} * 2, 8, 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
    .balign 8
    .word 0, 0, 0
idt_pointer:
    .word 4095
    .quad idt
    .balign 4
start_info:
    .long 0
processors:
    .long 0

# Page tables: the first GiB, the virtio-mmio slots and the local APIC, in 2 MiB pages. They are data, so that no ring-0
# instruction is spent on them; ring 3 maps the rest of the RAM.
    .balign 4096
boot_pml4:
    .quad boot_pdpt + 0x27
    .fill 511, 8, 0
.globl boot_pdpt
boot_pdpt:
    .quad boot_pd0 + 0x27, 0, 0, boot_pd3 + 0x27
    .fill 508, 8, 0
boot_pd0:
    .set page, 0
    .rept 512
    .quad page * 0x200000 + 0xe7    # present, writable, user, accessed, dirty, 2 MiB
    .set page, page + 1
    .endr
.globl boot_pd3
boot_pd3:
    .fill 501, 8, 0
    .quad {DEVICES} + 0xff          # and not cached
    .quad 0
    .quad {LAPIC} + 0xff
    .fill 8, 8, 0

.section .bss.entry, "aw", @nobits
    .balign 4096
.globl idt
idt:
    .skip 4096
    .balign {CPU_BLOCK}
cpu_blocks:
    .skip {MAX_CPUS} * {CPU_BLOCK}

.text
