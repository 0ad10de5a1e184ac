; INVLPG is one CPU's own affair: after it CPU 0 faults on the freed page, and CPU 1 reads on.
; vmemu: cpus=2
; expect: fault #PF error=0x0000 address=[p]
; expect: oops
; expect: memory seen == 0x77
; expect: tlbsan "use-after-unmap in flushed_wait"

section .text
init_module:
    push rbx
    mov edi, 4096
    call vmalloc
    mov [p], rax
    mov qword [rax], 0x77
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
    mov rax, [p]
    invlpg [rax]
    mov qword [flushed], 1
    mov rdi, rbx
    call vmemu_join
    mov rax, [p]
    mov rax, [rax]
    pop rbx
    ret
reader:
    mov rax, [p]
    mov rcx, [rax]
    mov qword [touched], 1
flushed_wait:
    pause
    cmp qword [flushed], 0
    je flushed_wait
    mov rcx, [rax]
    mov [seen], rcx
    ret

section .data
p: dq 0
touched: dq 0
flushed: dq 0
seen: dq 0
