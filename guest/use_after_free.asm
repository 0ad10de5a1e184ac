; After vfree and vm_unmap_aliases, which flushes what vfree left to be flushed later, the area is gone.
; expect: fault #PF error=0x0000 address=[p]
; expect: oops "BUG: unable to handle page fault for address"

section .text
init_module:
    mov edi, 4096
    call vmalloc
    mov [p], rax
    mov rdi, rax
    call vfree
    call vm_unmap_aliases
    mov rax, [p]
    mov al, [rax]
    xor eax, eax
    ret

section .bss
p: resq 1
