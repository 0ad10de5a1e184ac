; Two CPUs add one to a counter by load, add and store. Turn by turn they count to two; where one CPU takes the turn between the
; other's load and store, an addition is lost. `vmemu explore` finds that with one preemption.
; vmemu: cpus=2
; expect: return 2
; expect: no-fault

section .text
init_module:
    push rbx
    mov edi, 1
    lea rsi, [add_one]
    xor edx, edx
    call vmemu_run_on
    mov rbx, rax
    call add_one
    mov rdi, rbx
    call vmemu_join
    mov rax, [count]
    pop rbx
    ret
add_one:
    mov rax, [count]
    add rax, 1
    mov [count], rax
    ret

section .data
count: dq 0
