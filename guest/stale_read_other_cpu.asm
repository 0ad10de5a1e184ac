; vfree clears the entries and frees the frames; CPU 1, which has the translation cached, reads on. CPU 2, which never touched
; the page, faults.
; vmemu: cpus=3
; expect: fault #PF error=0x0000 address=[p]
; expect: oops "BUG: unable to handle page fault"
; expect: memory seen == 0x1234
; expect: count flush 0
; expect: tlbsan "use-after-unmap in freed_wait"

section .text
init_module:
    push rbx
    mov edi, 4096
    call vmalloc
    mov [p], rax
    mov qword [rax], 0x1234
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
    mov qword [freed], 1
    mov rdi, rbx
    call vmemu_join
    mov edi, 2
    lea rsi, [latecomer]
    xor edx, edx
    call vmemu_run_on
    mov rdi, rax
    call vmemu_join
    pop rbx
    ret
reader:
    mov rax, [p]
    mov rcx, [rax]
    mov qword [touched], 1
freed_wait:
    pause
    cmp qword [freed], 0
    je freed_wait
    mov rcx, [rax]
    mov [seen], rcx
    ret
latecomer:
    mov rax, [p]
    mov rcx, [rax]
    ret

section .data
p: dq 0
touched: dq 0
freed: dq 0
seen: dq 0
