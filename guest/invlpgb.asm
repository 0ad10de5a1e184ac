; A CPU with INVLPGB flushes the translations of all CPUs by itself: the purge sends no IPI, and CPU 1 faults all the same.
; vmemu: cpus=2 invlpgb=on
; expect: fault #PF error=0x0000 address=[p]
; expect: oops
; expect: count ipi 0

section .text
init_module:
    push rbx
    mov edi, 4096
    call vmalloc
    mov [p], rax
    mov qword [rax], 1
    mov edi, 1
    lea rsi, [reader]
    xor edx, edx
    call vmemu_run_on
    mov rbx, rax
touched_wait:
    pause
    cmp qword [touched], 0
    je touched_wait
    mov rdi, [p]
    call vfree
    call vm_unmap_aliases
    mov qword [purged], 1
    mov rdi, rbx
    call vmemu_join
    pop rbx
    ret
reader:
    mov rax, [p]
    mov rcx, [rax]
    mov qword [touched], 1
purged_wait:
    pause
    cmp qword [purged], 0
    je purged_wait
    mov rcx, [rax]
    ret

section .data
p: dq 0
touched: dq 0
purged: dq 0
