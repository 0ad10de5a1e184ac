; vm_unmap_aliases flushes what was freed lazily, on every CPU by one IPI each: then CPU 1 faults too.
; vmemu: cpus=4
; expect: fault #PF error=0x0000 address=[p]
; expect: oops
; expect: count flush 1
; expect: count ipi 3
; expect: memory purged == 1

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
