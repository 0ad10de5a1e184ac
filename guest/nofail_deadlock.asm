; An allocation that may not fail and cannot be met is the end of the machine.
; vmemu: memory=256M
; expect: panic "System is deadlocked on memory"

section .text
init_module:
    push rbx
    mov ebx, 2
.again:
    mov edi, 128 << 20
    mov esi, 0x8cc0                     ; GFP_KERNEL | __GFP_NOFAIL
    call __vmalloc
    dec ebx
    jnz .again
    xor eax, eax
    pop rbx
    ret
