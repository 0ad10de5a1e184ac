; kfree of a vmalloc address looks for a struct page where none is.
; expect: fault #PF error=0x0000
; expect: oops "BUG: unable to handle page fault for address"

section .text
init_module:
    mov edi, 4096
    call vmalloc
    mov rdi, rax
    call kfree
    xor eax, eax
    ret
