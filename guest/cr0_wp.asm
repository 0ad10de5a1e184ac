; A supervisor write ignores the RW bit only while CR0.WP is clear.
; expect: fault #PF error=0x0003 address=[p]
; expect: oops "#PF: error_code(0x0003) - permissions violation"
; expect: memory [p] == 0x77

CR0_WP equ 1 << 16

section .text
init_module:
    mov edi, 0xcc0
    xor esi, esi
    call alloc_pages
    mov [pages], rax
    lea rdi, [pages]
    mov esi, 1
    mov edx, 4                          ; VM_MAP
    mov rcx, 0x8000000000000121         ; PAGE_KERNEL_RO
    call vmap
    mov [p], rax
    mov rcx, cr0
    mov rdx, rcx
    and rdx, ~CR0_WP
    mov cr0, rdx
    mov qword [rax], 0x77
    mov cr0, rcx
    mov qword [rax], 0x88
    xor eax, eax
    ret

section .bss
pages: resq 1
p: resq 1
