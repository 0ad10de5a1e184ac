; A second vfree of the same address is a warning and frees nothing.
; expect: return 0
; expect: no-fault
; expect: log "WARNING: CPU: 0 PID: 100 at mm/vmalloc.c:3426 vfree+0x"
; expect: log "Trying to vfree() nonexistent vm area"

section .text
init_module:
    push rbx
    mov edi, 4096
    call vmalloc
    mov rbx, rax
    mov rdi, rax
    call vfree
    mov rdi, rbx
    call vfree
    xor eax, eax
    pop rbx
    ret
