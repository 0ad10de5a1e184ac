; CPU 1 tells CPU 0 while it uses a page, and reads it once more when it has told that it no longer does. CPU 0 may have freed it
; by then, and the TLB of CPU 1 still has it: no exception, a frame that is free. TLBSan sees it in the interleaving that
; `vmemu explore` finds, with two preemptions.
; vmemu: cpus=2
; expect: return 0
; expect: no-fault

section .text
init_module:
    push rbx
    push r12
    sub rsp, 8
    mov edi, 1
    lea rsi, [read_twice]
    xor edx, edx
    call vmemu_run_on
    mov r12, rax
    mov edi, 4096
    call vmalloc
    mov rbx, rax
    mov [page], rax
    mov qword [page], 0
    cmp qword [uses], 0
    jne .in_use
    mov rdi, rbx
    call vfree
.in_use:
    mov rdi, r12
    call vmemu_join
    xor eax, eax
    add rsp, 8
    pop r12
    pop rbx
    ret
read_twice:
    mov qword [uses], 1
    mov rcx, [page]
    test rcx, rcx
    jz .none
    mov rax, [rcx]
    mov qword [uses], 0
    mov rax, [rcx]
.none:
    mov qword [uses], 0
    ret

section .data
page: dq 0
uses: dq 0
