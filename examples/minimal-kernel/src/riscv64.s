# From QEMU's reset code (`-machine virt -bios none`) to Rust. It leaves us in machine mode without paging, interrupts off, .bss zero, the number
# of the CPU in a0 and the device tree at a1.

.section .text.start, "ax"
.global _start
_start:
    bnez a0, wait
    li t0, 0x2000                   # mstatus.FS: floating point
    csrs mstatus, t0
    la sp, stack + 0x20000
    mv a0, a1
    call start_kernel
wait:
    wfi
    j wait

.local stack
.comm stack, 0x20000, 16
