# A stub for each of the 256 vectors, 16 bytes apart. Each leaves a `Frame` on the stack and calls `trap`.

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
    jmp trap_common
    .set vector, vector + 1
.endr

    .balign 16
trap_common:
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
    movq %rsp, %rdi
    call trap
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
    addq $16, %rsp
    iretq

# u64 probe_load(u64 address): the fault handler sends it to probe_failed if there is nothing.
.global probe_load
probe_load:
    movb (%rdi), %al
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
