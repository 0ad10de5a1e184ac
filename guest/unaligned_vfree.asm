; vfree of an address that is not page aligned is a warning, and the memory stays.
; expect: return 7
; expect: no-fault
; expect: log "WARNING: CPU: 0 PID: 100 at mm/vmalloc.c:3291 remove_vm_area+0x"
; expect: log "Trying to vfree() bad address"

section .text
init_module:
    push rbx
    mov edi, 4096
    call vmalloc
    mov rbx, rax
    mov dword [rax], 7
    lea rdi, [rax + 8]
    call vfree
    mov eax, [rbx]
    pop rbx
    ret
