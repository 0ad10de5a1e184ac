; The frame of freed memory goes to another owner before any TLB is flushed: a store of CPU 1 through its old translation lands
; in what CPU 0 has allocated since.
; vmemu: cpus=2
; expect: return 0x4141
; expect: no-fault
; expect: count flush 0
; expect: tlbsan "use-after-unmap of a frame that has another owner in freed_wait"

section .text
init_module:
    push rbx
    push r12
    push r13
    mov edi, 4096
    call vmalloc
    mov [p], rax
    mov qword [rax], 1
    mov rdi, rax
    call vmalloc_to_pfn
    mov r12, rax
    mov edi, 1
    lea rsi, [writer]
    xor edx, edx
    call vmemu_run_on
    mov rbx, rax
touched_wait:
    pause
    cmp qword [touched], 0
    je touched_wait
    mov rdi, [p]
    call vfree
    ; Allocate until the frame comes back: the allocator hands out first what was freed last.
    mov r13d, 64
again:
    mov edi, 4096
    call vzalloc
    mov [q], rax
    mov rdi, rax
    call vmalloc_to_pfn
    cmp rax, r12
    je found
    dec r13
    jnz again
    mov eax, 1
    jmp out
found:
    mov qword [freed], 1
    mov rdi, rbx
    call vmemu_join
    mov rax, [q]
    mov rax, [rax]
out:
    pop r13
    pop r12
    pop rbx
    ret
writer:
    mov rax, [p]
    mov qword [rax], 2
    mov qword [touched], 1
freed_wait:
    pause
    cmp qword [freed], 0
    je freed_wait
    mov qword [rax], 0x4141
    ret

section .data
p: dq 0
q: dq 0
touched: dq 0
freed: dq 0
