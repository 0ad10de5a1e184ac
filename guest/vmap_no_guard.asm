; vmap does not leave out the guard page: VM_NO_GUARD is a warning, and a read past the end faults.
; expect: fault #PF error=0x0000 address=[p]+0x1000
; expect: oops
; expect: log "WARNING: CPU: 0 PID: 100 at mm/vmalloc.c:3512 vmap+0x"

section .text
init_module:
    mov edi, 0xcc0
    xor esi, esi
    call alloc_pages
    mov [pages], rax
    lea rdi, [pages]
    mov esi, 1
    mov edx, 0x44                       ; VM_MAP | VM_NO_GUARD
    mov rcx, 0x8000000000000163
    call vmap
    mov [p], rax
    mov cl, [rax + 4096]
    xor eax, eax
    ret

section .bss
pages: resq 1
p: resq 1
