; vmap never maps executable memory, whatever protection it is given.
; expect: fault #PF error=0x0011 address=[p] rip=[p]
; expect: log "kernel tried to execute NX-protected page - exploit attempt?"
; expect: oops

GFP_KERNEL equ 0xcc0
VM_MAP equ 4
PAGE_KERNEL_EXEC equ 0x163

section .text
init_module:
    mov edi, GFP_KERNEL
    xor esi, esi
    call alloc_pages
    mov [pages], rax
    lea rdi, [pages]
    mov esi, 1
    mov edx, VM_MAP
    mov ecx, PAGE_KERNEL_EXEC
    call vmap
    mov [p], rax
    mov byte [rax], 0xc3                ; ret
    call rax
    xor eax, eax
    ret

section .bss
pages: resq 1
p: resq 1
