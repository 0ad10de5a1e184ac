; After vfree a CPU that still has the translation in its TLB reads on, until vm_unmap_aliases.
; expect: fault #PF error=0x0000 address=[p]
; expect: faults #PF 1
; expect: oops
; expect: memory seen == 0x1234
; expect: tlbsan "use-after-unmap"

section .text
init_module:
    mov edi, 4096
    call vmalloc
    mov [p], rax
    mov qword [rax], 0x1234
    mov rdi, rax
    call vfree
    mov rax, [p]
    mov rcx, [rax]
    mov [seen], rcx
    call vm_unmap_aliases
    mov rax, [p]
    mov rcx, [rax]
    xor eax, eax
    ret

section .bss
p: resq 1
seen: resq 1
