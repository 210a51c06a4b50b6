# A stub for each of the 256 vectors, 16 bytes apart. Each leaves a `Frame` on the stack and calls `trap`.
#
# In the kernel `gs` is the CPU's own area, in user mode it is the user's; `swapgs` changes them. What comes from user mode says so in its saved %cs. But an NMI, a
# double fault or a machine check may strike in the kernel's first or last instructions, before or after the `swapgs`: these look at what `gs` is now. The kernel's
# area is in the upper half of addresses; users cannot set theirs there, since they may not write the base.

.section .text.traps, "ax"
.code64
    .balign 16
.global trap_stubs
trap_stubs:
.set vector, 0
.rept 256
    .balign 16
    # Those for which the CPU pushes an error code.
    .if (vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    pushq $0
    .endif
    pushq $vector
    .if (vector == 2) || (vector == 8) || (vector == 18)
    jmp trap_paranoid
    .else
    jmp trap_common
    .endif
    .set vector, vector + 1
.endr

.macro push_registers
    pushq %rax
    pushq %rbx
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %rbp
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    cld
    # What users allowed themselves is not the kernel's: it touches their memory where it says so.
    cmpb $0, users_guarded(%rip)
    je 1f
    clac
1:
.endm

# Who walks the stack ends where users begin: what they have in %rbp is no place of ours.
.macro end_walk_at_user
    testb $3, FRAME_CS(%rsp)
    jz 1f
    xorl %ebp, %ebp
1:
.endm

.macro pop_general
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rbp
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rbx
    popq %rax
.endm

.macro pop_registers
    pop_general
    addq $16, %rsp
.endm

    .balign 16
trap_common:
    testb $3, 24(%rsp)
    jz 2f
    swapgs
2:
    push_registers
    end_walk_at_user
    movq %rsp, %rdi
    call trap
# %rsp: a `Frame`. Interrupts are off.
.global trap_return
trap_return:
    testb $3, FRAME_CS(%rsp)
    jnz 1f
    cmpl $0, %gs:PERCPU_NMIS_IN
    jne trap_return_in_nmi
1:
    pop_registers
    testb $3, 8(%rsp)
    jz 2f
    swapgs
2:
    iretq

# The same from a fault in an NMI's handler. `iretq` would let the next NMI come, which begins at the top of the very stack that this one is on. So what it would
# do between two places of the kernel on one stack is done without it.
    .balign 16
trap_return_in_nmi:
    movq FRAME_RSP(%rsp), %rax
    movq FRAME_RIP(%rsp), %rcx
    movq FRAME_RFLAGS(%rsp), %rdx
    # Below what the fault struck. The last words of the frame may be there, which have been read.
    subq $16, %rax
    movq %rdx, (%rax)
    movq %rcx, 8(%rax)
    movq %rax, FRAME_VECTOR(%rsp)
    pop_general
    movq (%rsp), %rsp
    popfq
    ret

    .balign 16
trap_paranoid:
    push_registers
    end_walk_at_user
    # In the kernel's first and last instructions, all of them here, it is the user's still or again.
    leaq trap_stubs(%rip), %rax
    cmpq %rax, FRAME_RIP(%rsp)
    jb 1f
    leaq trap_code_end(%rip), %rax
    cmpq %rax, FRAME_RIP(%rsp)
    jae 1f
    xorl %ebp, %ebp
1:
    movl $0xc0000101, %ecx      # IA32_GS_BASE
    rdmsr
    xorl %ebx, %ebx
    testl %edx, %edx
    js 2f
    swapgs
    incl %ebx
2:
    movq %rsp, %rdi
    call trap
    testl %ebx, %ebx
    jz 3f
    swapgs
3:
    pop_registers
    iretq

# Where the instruction `syscall` comes: %rcx is where it came from, %r11 its flags, the stack is the user's. Makes the same frame as a trap.
    .balign 16
.global syscall_entry
syscall_entry:
    swapgs
    movq %rsp, %gs:PERCPU_USER_SP
    movq %gs:PERCPU_TRAP_SP, %rsp
    pushq $USER_DATA
    pushq %gs:PERCPU_USER_SP
    pushq %r11
    pushq $USER_CODE
    pushq %rcx
    pushq $0
    pushq $SYSCALL
    push_registers
    xorl %ebp, %ebp
    movq %rsp, %rdi
    call trap
    jmp trap_return
trap_code_end:

# u64 probe_load(u64 address): the fault handler sends it to probe_failed if there is nothing.
.global probe_load
probe_load:
    movb (%rdi), %al
    xorl %eax, %eax
    ret
# u64 user_load(u64 address, u64 *out) and u64 user_store(u64 address, u64 value): the same, of a word.
.global user_load
user_load:
    movq (%rdi), %rax
    movq %rax, (%rsi)
    xorl %eax, %eax
    ret
.global user_store
user_store:
    movq %rsi, (%rdi)
    xorl %eax, %eax
    ret
.global probe_failed
probe_failed:
    movl $1, %eax
    ret

# void run_on(void *stack_top, void (*function)(void *), void *argument)
.global run_on
run_on:
    pushq %rbp
    movq %rsp, %rbp
    movq %rdi, %rsp
    movq %rdx, %rdi
    call *%rsi
    movq %rbp, %rsp
    popq %rbp
    ret
