# From one thread to another, and where a new one begins.

.section .text.switch, "ax"
.code64

# Thread *switch_stacks(Thread *from, Thread *to): leaves `from` and comes back when somebody switches to it again; who ran on this CPU just before is what it
# gives. The saved stack pointer is a thread's first word. Interrupts are off; an NMI may strike anywhere here, and finds a good stack of its own.
.global switch_stacks
switch_stacks:
    pushfq
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popfq
    movq %rdi, %rax
    ret

# Where the first switch to a new thread returns to: %rax is who ran before, %r12 the function that the thread runs, %r13 its argument.
.global thread_start
thread_start:
    movq %rax, %rdi
    movq %r12, %rsi
    movq %r13, %rdx
    xorl %ebp, %ebp
    call thread_begin
    ud2

# u64 enter_user(const Frame *frame): goes to user mode as the frame says, and comes back when `leave_user` is called. Interrupts are off.
# What is saved here is where traps from user mode begin to push: the task state and the percpu area are told.
.global enter_user
enter_user:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    subq $8, %rsp
    movq %gs:PERCPU_CURRENT, %rax
    movq %rsp, THREAD_USER_TRAPS(%rax)
    movq %rsp, %gs:PERCPU_TRAP_SP
    movq %gs:PERCPU_TSS_SP, %rax
    movq %rsp, (%rax)
    movq %rdi, %rsp
    jmp trap_return

# void leave_user(u64 value, u64 saved): back to where `enter_user` was called, on this thread's stack. Interrupts are off.
.global leave_user
leave_user:
    movq %rdi, %rax
    movq %rsi, %rsp
    addq $8, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
