; The second kfree of an object in a row is a BUG.
; expect: oops "kernel BUG at mm/slub.c:550!"

section .text
init_module:
    push rbx
    mov edi, 64                         ; another object keeps the slab in use
    mov esi, 0xcc0
    call kmalloc
    mov edi, 64
    mov esi, 0xcc0
    call kmalloc
    mov rbx, rax
    mov rdi, rax
    call kfree
    mov rdi, rbx
    call kfree
    xor eax, eax
    pop rbx
    ret
