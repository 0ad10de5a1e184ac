; After set_memory_ro a write to vmalloc memory violates its permissions.
; expect: fault #PF error=0x0003 address=[p]+8
; expect: oops "BUG: unable to handle page fault for address"
; expect: memory result == 0

section .text
init_module:
    mov edi, 4096
    call vmalloc
    mov [p], rax
    mov qword [rax + 8], 1
    mov rdi, rax
    mov esi, 1
    call set_memory_ro
    mov [result], rax
    mov rax, [p]
    mov rcx, [rax + 8]
    mov [rax + 8], rcx
    xor eax, eax
    ret

section .bss
p: resq 1
result: resq 1
