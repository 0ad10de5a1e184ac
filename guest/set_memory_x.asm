; vmalloc memory that set_memory_x has made executable runs.
; expect: return 42
; expect: no-fault

section .text
init_module:
    push rbx
    mov edi, 4096
    call vmalloc
    mov rbx, rax
    mov dword [rax], 0x00002ab8         ; mov eax, 42; ret
    mov word [rax + 4], 0xc300
    mov rdi, rax
    mov esi, 1
    call set_memory_x
    call rbx
    pop rbx
    ret
