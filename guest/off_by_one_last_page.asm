; vmalloc(100) maps a whole page: the bytes from 100 to the end of the page are writable and no fault tells of the overrun.
; expect: return 4096
; expect: no-fault
; expect: no-log "BUG:"

section .text
init_module:
    mov edi, 100
    call vmalloc
    mov rdx, rax
    mov ecx, 100
.overrun:
    mov byte [rdx + rcx], 0x5a
    inc ecx
    cmp ecx, 4096
    jne .overrun
    mov [end], rcx
    mov rdi, rdx
    call vfree
    mov eax, [end]
    ret

section .bss
end: resq 1
