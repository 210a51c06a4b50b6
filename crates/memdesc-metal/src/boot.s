# From where the loader, the firmware or another CPU leaves us to Rust in 64 bits.
#
# The first CPU comes in by PVH (Xen's `docs/misc/pvh.pandoc`): 32 bits, flat segments, no paging, %ebx has the address of what the loader has to say. The
# others come in by INIT-SIPI-SIPI in 16 bits, at the page that `ap_trampoline` was copied to. Both go on at `to_long_mode` under the same first page
# tables: 1 GiB from physical address 0 on, at address 0, in the direct map and where the image is linked.

.set KERNEL_BASE, 0xffffffff80000000
.set EFER, 0xc0000080
.set AP_BASE, 0x8000

.section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18              # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start - KERNEL_BASE

.section .init.text, "ax"
.code32
.global pvh_start
pvh_start:
    cld
    cli
    movl %ebx, %ebp
    # Whoever loads us should have zeroed this.
    movl $(__bss_start - KERNEL_BASE), %edi
    movl $(__bss_end - KERNEL_BASE), %ecx
    subl %edi, %ecx
    shrl $2, %ecx
    xorl %eax, %eax
    rep stosl
    movl $(bsp_long_mode - KERNEL_BASE), %edi
    jmp to_long_mode

# %edi: where to go on, in the low mapping. Keeps %ebp.
to_long_mode:
    movl %cr4, %eax
    orl $0x20, %eax             # PAE
    movl %eax, %cr4
    movl $(boot_pml4 - KERNEL_BASE), %eax
    movl %eax, %cr3
    movl $EFER, %ecx
    rdmsr
    orl $0x900, %eax            # LME, NXE
    wrmsr
    movl %cr0, %eax
    orl $0x80010000, %eax       # PG, WP
    movl %eax, %cr0
    lgdt (boot_gdt_low - KERNEL_BASE)
    ljmp $0x08, $(in_long_mode - KERNEL_BASE)

.code64
in_long_mode:
    jmp *%rdi

bsp_long_mode:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movabsq $boot_stack_top, %rsp
    movl %ebp, %edi
    xorl %ebp, %ebp
    movabsq $metal_start, %rax
    call *%rax
    ud2

ap_long_mode:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movabsq $1f, %rax
    jmp *%rax
1:
    # The stack is in vmalloc's range, which only the kernel's own tables know.
    movq ap_start_cr3(%rip), %rax
    movq %rax, %cr3
    movq ap_start_stack(%rip), %rsp
    movl ap_start_cpu(%rip), %edi
    xorl %ebp, %ebp
    call metal_ap_start
    ud2

.code32
ap_protected:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $(ap_long_mode - KERNEL_BASE), %edi
    jmp to_long_mode

.section .init.data, "aw"
.code16
.global ap_trampoline
ap_trampoline:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl AP_BASE + (ap_gdt_pointer - ap_trampoline)
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x18, $(ap_protected - KERNEL_BASE)
    .balign 4
ap_gdt_pointer:
    .word boot_gdt_end - boot_gdt - 1
    .long boot_gdt - KERNEL_BASE
.global ap_trampoline_end
ap_trampoline_end:

.section .init.data, "aw"
    .balign 8
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # 0x08: code, 64 bits
    .quad 0x00cf93000000ffff    # 0x10: data
    .quad 0x00cf9b000000ffff    # 0x18: code, 32 bits
boot_gdt_end:
boot_gdt_low:
    .word boot_gdt_end - boot_gdt - 1
    .quad boot_gdt - KERNEL_BASE

    .balign 8
# What a CPU that starts is told, one at a time.
.global ap_start_cr3
ap_start_cr3: .quad 0
.global ap_start_stack
ap_start_stack: .quad 0
.global ap_start_cpu
ap_start_cpu: .quad 0

    .balign 4096
.global boot_pml4
boot_pml4:
    .quad boot_pdpt - KERNEL_BASE + 3
    .fill 272, 8, 0
    .quad boot_pdpt - KERNEL_BASE + 3
    .fill 237, 8, 0
    .quad boot_pdpt_high - KERNEL_BASE + 3
boot_pdpt:
    .quad boot_pd - KERNEL_BASE + 3
    .fill 511, 8, 0
boot_pdpt_high:
    .fill 510, 8, 0
    .quad boot_pd - KERNEL_BASE + 3
    .quad 0
boot_pd:
    .set at, 0
    .rept 512
    .quad (at << 21) | 0x83
    .set at, at + 1
    .endr

.section .init.bss, "aw", @nobits
    .balign 4096
    .skip 65536
boot_stack_top:
