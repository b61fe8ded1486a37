.section .multiboot,"a"
.align 4
.long 0x1BADB002, 0x00000003, -(0x1BADB002+0x00000003)
.section .text
.code32
.globl _start
_start:
 cli
 movl $stack_top, %esp
 # page tables: identity 1 GB by 2 MB pages
 movl $pml4, %edi
 movl $pdpt, %eax
 orl $3, %eax
 movl %eax, (%edi)
 movl $pd, %eax
 orl $3, %eax
 movl %eax, pdpt
 movl $pd, %edi
 movl $0x83, %eax
 movl $512, %ecx
1: movl %eax, (%edi)
 addl $8, %edi
 addl $0x200000, %eax
 loop 1b
 movl %cr4, %eax
 orl $0x40620, %eax        # PAE OSFXSR OSXMMEXCPT OSXSAVE
 movl %eax, %cr4
 movl $pml4, %eax
 movl %eax, %cr3
 movl $0xC0000080, %ecx
 rdmsr
 orl $0x100, %eax
 wrmsr
 movl %cr0, %eax
 andl $~4, %eax
 orl $0x80000002, %eax
 movl %eax, %cr0
 lgdt gdtr
 ljmp $8, $long
.code64
long:
 movw $16, %ax
 movw %ax, %ds
 movw %ax, %es
 movw %ax, %ss
 movq $stack_top, %rsp
 call run
2: hlt
 jmp 2b
.section .data
.align 16
gdt: .quad 0, 0x00209A0000000000, 0x0000920000000000
gdtr: .word 23
 .long gdt
.section .bss
.align 4096
pml4: .skip 4096
pdpt: .skip 4096
pd: .skip 4096
.skip 65536*4
stack_top:
