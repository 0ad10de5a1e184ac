; Per-CPU memory of modules is one piece for each CPU behind one GS-relative pointer: each CPU writes its own, CPU 0 adds them up.
; vmemu: cpus=4
; expect: return 100
; expect: no-fault

section .text
init_module:
    push rbx
    push r12
    mov edi, 8
    mov esi, 8
    call __alloc_percpu
    mov [pointer], rax
    mov r12d, 4
each:
    dec r12
    mov edi, r12d
    lea rsi, [store]
    mov rdx, r12
    inc rdx
    imul rdx, rdx, 10
    call vmemu_run_on
    mov rdi, rax
    call vmemu_join
    test r12, r12
    jnz each
    xor ebx, ebx
    mov r12d, 4
sum:
    dec r12
    mov rdi, [pointer]
    mov esi, r12d
    call per_cpu_ptr
    add rbx, [rax]
    test r12, r12
    jnz sum
    mov rdi, [pointer]
    call free_percpu
    mov rax, rbx
    pop r12
    pop rbx
    ret
store:
    mov rax, [pointer]
    mov gs:[rax], rdi
    ret

section .data
pointer: dq 0
