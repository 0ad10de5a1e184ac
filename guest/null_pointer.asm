; A pointer below the first page is reported as a NULL pointer dereference.
; expect: fault #PF error=0x0000 address=8
; expect: oops "BUG: kernel NULL pointer dereference, address: 0000000000000008"

section .text
init_module:
    xor eax, eax
    mov rax, [rax + 8]
    ret
