; A page that vmap mapped with PAGE_KERNEL_RO can be read, and a write to it violates its permissions.
; expect: fault #PF error=0x0003 address=[p]+0x10
; expect: oops "BUG: unable to handle page fault for address"
; expect: log "#PF: supervisor write access in kernel mode"
; expect: log "#PF: error_code(0x0003) - permissions violation"

GFP_KERNEL equ 0xcc0
VM_MAP equ 4
PAGE_KERNEL_RO equ 0x8000000000000121

section .text
init_module:
    mov edi, GFP_KERNEL
    xor esi, esi
    call alloc_pages
    mov [pages], rax
    lea rdi, [pages]
    mov esi, 1
    mov edx, VM_MAP
    mov rcx, PAGE_KERNEL_RO
    call vmap
    mov [p], rax
    mov rcx, [rax + 16]
    mov [rax + 16], rcx
    xor eax, eax
    ret

section .bss
pages: resq 1
p: resq 1
