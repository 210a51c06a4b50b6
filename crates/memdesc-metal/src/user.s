# Programs that run in user mode: one piece of text, at whatever address, that is mapped from a file. Each starts with its arguments in %rdi and %rdx, its memory at
# %rsi and a stack, and ends by `exit` with what it found: a sum, or WRONG with where.
#
# System calls: the number in %rax, arguments in %rdi and %rsi, the answer in %rax; %rcx and %r11 are lost.

.set SYS_EXIT, 0
.set SYS_WRITE, 1
.set SYS_YIELD, 2
.set SYS_FORK, 3
.set SYS_WAIT, 4
.set SYS_MMAP, 5
.set SYS_MUNMAP, 6
.set SYS_SLEEP, 7
.set WRONG, 0xbad0000

.section .rodata.user, "a"
.code64
    .balign 4096
.global user_text
user_text:

# Says a line.
.global user_hello
user_hello:
    leaq hello_text(%rip), %rdi
    movl $(hello_end - hello_text), %esi
    movl $SYS_WRITE, %eax
    syscall
    movq %rax, %rdi
    jmp exit
hello_text:
    .ascii "hello from ring 3\n"
hello_end:

exit:
    movl $SYS_EXIT, %eax
    syscall
    ud2
wrong:
    movl $WRONG, %edi
    addq %rbx, %rdi
    jmp exit

# Touches %rdi pages, which read zero at first, and adds up what it wrote there.
.global user_demand
user_demand:
    movq %rdi, %r12
    xorl %ebx, %ebx
1:  movq %rbx, %rax
    shlq $12, %rax
    cmpq $0, (%rsi,%rax)
    jne wrong
    cmpq $0, 4088(%rsi,%rax)
    jne wrong
    leaq 7(%rbx,%rbx,2), %rcx
    movq %rcx, (%rsi,%rax)
    incq %rbx
    cmpq %r12, %rbx
    jb 1b
    xorl %ebx, %ebx
    xorl %edi, %edi
2:  movq %rbx, %rax
    shlq $12, %rax
    addq (%rsi,%rax), %rdi
    incq %rbx
    cmpq %r12, %rbx
    jb 2b
    jmp exit

# Writes to %r12 pages at %r13: the page's number and %rdi.
fill:
    xorl %ebx, %ebx
1:  movq %rbx, %rax
    shlq $12, %rax
    leaq (%rbx,%rdi), %rcx
    movq %rcx, (%r13,%rax)
    movq %rcx, 4088(%r13,%rax)
    incq %rbx
    cmpq %r12, %rbx
    jb 1b
    ret

# They hold that; else this is wrong.
verify:
    xorl %ebx, %ebx
1:  movq %rbx, %rax
    shlq $12, %rax
    leaq (%rbx,%rdi), %rcx
    cmpq %rcx, (%r13,%rax)
    jne wrong
    cmpq %rcx, 4088(%r13,%rax)
    jne wrong
    incq %rbx
    cmpq %r12, %rbx
    jb 1b
    ret

# Forks, and both write to what they share: each sees its own. %rdi pages.
.global user_cow
user_cow:
    movq %rdi, %r12
    movq %rsi, %r13
    movl $1000, %edi
    call fill
    movl $SYS_FORK, %eax
    syscall
    testq %rax, %rax
    js fork_failed
    jz 2f
    # The parent, at the same time as the child.
    movl $3000, %edi
    call fill
    movl $SYS_YIELD, %eax
    syscall
    movl $3000, %edi
    call verify
    movl $SYS_WAIT, %eax
    syscall
    cmpq $77, %rax
    jne child_failed
    movl $3000, %edi
    call verify
    # And again, with a child that only looks.
    movl $SYS_FORK, %eax
    syscall
    testq %rax, %rax
    js fork_failed
    jz 3f
    movl $SYS_WAIT, %eax
    syscall
    cmpq $78, %rax
    jne child_failed
    # Nobody else has them now: they are written without copies.
    movl $4000, %edi
    call fill
    movl $4000, %edi
    call verify
    movl $42, %edi
    jmp exit
2:  movl $1000, %edi
    call verify
    movl $2000, %edi
    call fill
    movl $SYS_YIELD, %eax
    syscall
    movl $2000, %edi
    call verify
    movl $77, %edi
    jmp exit
3:  movl $3000, %edi
    call verify
    movl $78, %edi
    jmp exit
fork_failed:
    movq %rax, %rdi
    jmp exit
child_failed:
    # What the child found is what is said, so that it is no right answer.
    movq %rax, %rdi
    btsq $40, %rdi
    jmp exit

# A tree of processes, %rdi levels of children below this one: each has a number, finds its parent's in all %rdx pages, writes its own, forks two children, and finds its
# own there still when they are through. It says how many there were, with itself. The number is in %r14, the parent's in %r15.
.global user_tree
user_tree:
    movq %rdi, %rbp
    movq %rdx, %r12
    movq %rsi, %r13
    movl $1, %r14d
    movl $1, %r15d
    movl $1000, %edi
    call fill
tree_node:
    imulq $1000, %r15, %rdi
    call verify
    imulq $1000, %r14, %rdi
    call fill
    testq %rbp, %rbp
    jz tree_leaf
    movl $SYS_FORK, %eax
    syscall
    testq %rax, %rax
    js fork_failed
    jnz 1f
    movq %r14, %r15
    addq %r14, %r14
    decq %rbp
    jmp tree_node
1:  movl $SYS_FORK, %eax
    syscall
    testq %rax, %rax
    js fork_failed
    jnz 2f
    movq %r14, %r15
    leaq 1(%r14,%r14), %r14
    decq %rbp
    jmp tree_node
2:  imulq $1000, %r14, %rdi
    call verify
    movl $SYS_WAIT, %eax
    syscall
    cmpq $0xffff, %rax
    ja child_failed
    movq %rax, %r15
    movl $SYS_WAIT, %eax
    syscall
    cmpq $0xffff, %rax
    ja child_failed
    addq %rax, %r15
    imulq $1000, %r14, %rdi
    call verify
    leaq 1(%r15), %rdi
    jmp exit
tree_leaf:
    imulq $1000, %r14, %rdi
    call verify
    movl $1, %edi
    jmp exit

# Has %rdi in all segment registers, and calls %rdx times: finds nothing else in them at first nor afterwards, or nothing at all.
.macro look_at segment
    movl \segment, %eax
    testl %eax, %eax
    jz 2f
    cmpl %r13d, %eax
    jne wrong
2:
.endm
.global user_segments
user_segments:
    movl %edi, %r13d
    movq %rdx, %r12
1:  look_at %ds
    look_at %es
    look_at %fs
    look_at %gs
    movl %r13d, %ds
    movl %r13d, %es
    movl %r13d, %fs
    movl %r13d, %gs
    movl $SYS_YIELD, %eax
    syscall
    decq %r12
    jnz 1b
    movl $42, %edi
    jmp exit

# Has %rdi where a function has its frame, and calls %rdx times.
.global user_lead
user_lead:
    movq %rdi, %rbp
    movq %rdx, %r12
1:  movl $SYS_YIELD, %eax
    syscall
    decq %r12
    jnz 1b
    movl $42, %edi
    jmp exit

# Counts to %rdi without a system call, and has the same registers afterwards, and the same stack.
.global user_spin
user_spin:
    movq %rsi, %r8
    leaq 1(%rsi), %r9
    leaq 2(%rsi), %r10
    leaq 3(%rsi), %r11
    leaq 4(%rsi), %r12
    leaq 5(%rsi), %r13
    leaq 6(%rsi), %r14
    leaq 7(%rsi), %r15
    leaq 8(%rsi), %rbp
    pushq %rdi
1:  decq %rdi
    jnz 1b
    popq %rdi
    movl $1, %ebx
    subq %rsi, %r8
    leaq -8(%rbp), %rax
    subq %rsi, %rax
    orq %rax, %r8
    leaq -7(%r15), %rax
    subq %rsi, %rax
    orq %rax, %r8
    leaq -6(%r14), %rax
    subq %rsi, %rax
    orq %rax, %r8
    leaq -5(%r13), %rax
    subq %rsi, %rax
    orq %rax, %r8
    leaq -4(%r12), %rax
    subq %rsi, %rax
    orq %rax, %r8
    leaq -3(%r11), %rax
    subq %rsi, %rax
    orq %rax, %r8
    leaq -2(%r10), %rax
    subq %rsi, %rax
    orq %rax, %r8
    leaq -1(%r9), %rax
    subq %rsi, %rax
    orq %rax, %r8
    jnz wrong
    jmp exit

# Never ends by itself.
.global user_forever
user_forever:
    jmp user_forever

# Maps %rdx pages, writes to them, unmaps them, %rdi times; they read zero each time. Sleeps and yields between.
.global user_map
user_map:
    movq %rdi, %rbp
    movq %rdx, %r12
1:  movq %r12, %rdi
    shlq $12, %rdi
    movl $SYS_MMAP, %eax
    syscall
    testq %rax, %rax
    js fork_failed
    movq %rax, %r13
    xorl %ebx, %ebx
2:  movq %rbx, %rax
    shlq $12, %rax
    cmpq $0, (%r13,%rax)
    jne wrong
    incq %rbx
    cmpq %r12, %rbx
    jb 2b
    movl $5000, %edi
    call fill
    movl $SYS_YIELD, %eax
    syscall
    movl $5000, %edi
    call verify
    movq %r13, %rdi
    movq %r12, %rsi
    shlq $12, %rsi
    movl $SYS_MUNMAP, %eax
    syscall
    testq %rax, %rax
    jnz fork_failed
    decq %rbp
    jnz 1b
    movl $3, %edi
    movl $SYS_SLEEP, %eax
    syscall
    movl $9, %edi
    jmp exit

# Does what it may not, of the %rdi-th kind; says 1 if it got away with it.
.global user_bad
user_bad:
    movq %rsi, %r13
    leaq bad_table(%rip), %rax
    movslq (%rax,%rdi,4), %rcx
    addq %rcx, %rax
    jmp *%rax
    .balign 4
bad_table:
    .long bad_null - bad_table
    .long bad_kernel_read - bad_table
    .long bad_kernel_write - bad_table
    .long bad_execute - bad_table
    .long bad_text - bad_table
    .long bad_cli - bad_table
    .long bad_ud - bad_table
    .long bad_divide - bad_table
    .long bad_address - bad_table
    .long bad_unmapped - bad_table
    .long bad_float - bad_table
    .long bad_port - bad_table
    .long bad_msr - bad_table
    .long bad_int - bad_table
    .long bad_stack - bad_table
    .long bad_jump - bad_table
.global user_bad_kinds
.set user_bad_kinds, (. - bad_table) / 4
bad_null:
    movq 16, %rax
    jmp got_away
bad_kernel_read:
    movabsq $0xffff888000100000, %rax
    movq (%rax), %rax
    jmp got_away
bad_kernel_write:
    movabsq $0xffffffff80200000, %rax
    movq %rax, (%rax)
    jmp got_away
bad_execute:
    movb $0xc3, (%r13)
    call *%r13
    jmp got_away
bad_text:
    leaq user_hello(%rip), %rax
    movb $0x90, (%rax)
    jmp got_away
bad_cli:
    cli
    jmp got_away
bad_ud:
    ud2
bad_divide:
    xorl %ecx, %ecx
    divl %ecx
    jmp got_away
bad_address:
    movabsq $0x8000000000000000, %rax
    movq (%rax), %rax
    jmp got_away
bad_unmapped:
    movq $1, (%r13)
    movq %r13, %rdi
    movl $4096, %esi
    movl $SYS_MUNMAP, %eax
    syscall
    movq (%r13), %rax
    jmp got_away
bad_float:
    fldz
    jmp got_away
bad_port:
    movl $0x10, %eax
    outl %eax, $0xf4
    jmp got_away
bad_msr:
    movl $0xc0000101, %ecx
    rdmsr
    jmp got_away
bad_int:
    int $0x21
    jmp got_away
bad_stack:
    xorl %esp, %esp
    pushq %rax
    jmp got_away
bad_jump:
    movabsq $0xffffffff80200000, %rax
    jmp *%rax
got_away:
    movl $1, %edi
    jmp exit
.global user_text_end
user_text_end:
