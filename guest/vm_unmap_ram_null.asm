; vm_unmap_ram of NULL is a BUG.
; expect: oops "kernel BUG at mm/vmalloc.c:3002!"

section .text
init_module:
    xor edi, edi
    mov esi, 1
    call vm_unmap_ram
    xor eax, eax
    ret
