; Two CPUs add one to a counter by an instruction that is locked: no interleaving loses an addition. The same as racy_counter.asm
; but for that instruction.
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
    lock inc qword [count]
    ret

section .data
count: dq 0
