# From a PVH loader (QEMU's -kernel, Firecracker: Xen's docs/misc/pvh.pandoc) to Rust. It leaves us in 32 bits with flat segments and without
# paging, interrupts off, %ebx leading to what it has to say, and .bss zero.

.section .note, "a", @note          # how the loader finds `_start`
    .long 4, 8, 18                  # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad _start

.text
.code32
.global _start
_start:
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0x20, %eax                 # PAE
    mov %eax, %cr4
    mov $0xc0000080, %ecx           # EFER: LME, the 64 bits
    mov $0x100, %eax
    xor %edx, %edx
    wrmsr
    mov $0x80010001, %eax           # PG, WP, PE
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $in_64_bits

.code64
in_64_bits:
    xor %eax, %eax
    mov %eax, %ss
    lea stack + 0x20000(%rip), %rsp
    mov %ebx, %edi
    call start_kernel

.section .data.boot, "aw"
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 8: code, 64 bits
gdt_pointer:
    .word . - gdt - 1
    .quad gdt

    # The first 4 GiB, by 2 MiB: at address 0, where we run, and in the upper half, which is the direct map.
    .balign 4096
pml4:
    .quad pdpt + 3
    .fill 255, 8, 0
    .quad pdpt + 3
    .fill 255, 8, 0
pdpt:
    .quad pd + 3, pd + 0x1003, pd + 0x2003, pd + 0x3003
    .fill 508, 8, 0
pd:
    .set at, 0
    .rept 2048
    .quad at + 0x83
    .set at, at + 0x200000
    .endr

.local stack
.comm stack, 0x20000, 16
