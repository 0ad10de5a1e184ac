; Kernel translations are global: a load of CR3 leaves them, so freed memory is still readable; a toggle of CR4.PGE does not.
; expect: fault #PF error=0x0000 address=[p]
; expect: oops
; expect: memory seen == 0x55
; expect: tlbsan "use-after-unmap in init_module"

section .text
init_module:
    mov edi, 4096
    call vmalloc
    mov [p], rax
    mov qword [rax], 0x55
    mov rdi, rax
    call vfree
    mov rax, cr3
    mov cr3, rax
    mov rax, [p]
    mov rcx, [rax]
    mov [seen], rcx
    mov rcx, cr4
    mov rdx, rcx
    xor rdx, 0x80
    mov cr4, rdx
    mov cr4, rcx
    mov rcx, [rax]
    ret

section .data
p: dq 0
seen: dq 0
