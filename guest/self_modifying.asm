; Code that is rewritten in place runs in its new form at the next call.
; expect: return 5050
; expect: no-fault

section .text
init_module:
    push rbx
    push r12
    push r13
    mov edi, 4096
    call vmalloc
    mov rbx, rax
    mov rdi, rax
    mov esi, 1
    call set_memory_x
    mov byte [rbx], 0xb8                ; mov eax, imm32
    mov byte [rbx + 5], 0xc3            ; ret
    xor r12d, r12d
    xor r13d, r13d
.next:
    inc r12d
    mov [rbx + 1], r12d
    call rbx
    add r13d, eax
    cmp r12d, 100
    jne .next
    mov eax, r13d
    pop r13
    pop r12
    pop rbx
    ret
