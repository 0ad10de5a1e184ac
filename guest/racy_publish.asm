; CPU 1 looks for a page that CPU 0 publishes, withdraws and frees. It reads the page without a lock: in most interleavings it
; finds none, and only `vmemu explore` finds the one that reads freed memory.
; vmemu: cpus=2
; expect: return 0
; expect: no-fault

section .text
init_module:
    push rbx
    push r12
    mov edi, 1
    lea rsi, [look]
    xor edx, edx
    call vmemu_run_on
    mov r12, rax
    mov edi, 4096
    call vmalloc
    mov rbx, rax
    mov [page], rax
    mov qword [page], 0
    mov rdi, rbx
    call vfree
    mov rdi, r12
    call vmemu_join
    xor eax, eax
    pop r12
    pop rbx
    ret
look:
    mov rax, [page]
    test rax, rax
    jz nothing
    mov rax, [rax]
nothing:
    ret

section .data
page: dq 0
