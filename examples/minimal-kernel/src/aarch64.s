# From QEMU's loader (`-machine virt -kernel ELF`) to Rust. It leaves us in EL1 with the MMU off, interrupts masked, .bss zero, and the device tree
# at the start of RAM.

.text
.global _start
_start:
    mov x0, #(3 << 20)              // CPACR_EL1: floating point and vectors
    msr cpacr_el1, x0
    adrp x0, table
    msr ttbr0_el1, x0
    mov x0, #0xff00                 // attribute 0: a device's; 1: ordinary memory
    msr mair_el1, x0
    ldr x0, =0x200803519            // TCR_EL1: 39 bits, 4 KiB, inner shareable, write-back; 40 bits of physical address; no upper half
    msr tcr_el1, x0
    tlbi vmalle1
    dsb sy
    isb
    mrs x0, sctlr_el1
    mov x1, #0x1005                 // MMU and both caches on
    orr x0, x0, x1
    msr sctlr_el1, x0
    isb
    adrp x0, stack + 0x20000
    mov sp, x0
    mov x0, #0x40000000
    bl start_kernel

.section .data.boot, "aw"
    // 512 GiB by 1 GiB where they are: the first is devices', the others memory.
    .balign 4096
table:
    .quad 0x0060000000000401        // access flag, not to be executed
    .set at, 0x40000000
    .rept 511
    .quad at + 0x705                // access flag, inner shareable, attribute 1
    .set at, at + 0x40000000
    .endr

.local stack
.comm stack, 0x20000, 4096
