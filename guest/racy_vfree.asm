; Two CPUs free a page unless the other one has: each looks whether there is a page, forgets it and frees it. Where one takes the
; turn between the other's look and its store, the page is freed twice. `vmemu explore` finds that with one preemption.
; vmemu: cpus=2
; expect: return 0
; expect: no-log "Trying to vfree() nonexistent vm area"

section .text
init_module:
    push rbx
    mov edi, 4096
    call vmalloc
    mov [page], rax
    mov edi, 1
    lea rsi, [free_page]
    xor edx, edx
    call vmemu_run_on
    mov rbx, rax
    call free_page
    mov rdi, rbx
    call vmemu_join
    xor eax, eax
    pop rbx
    ret
free_page:
    mov rdi, [page]
    test rdi, rdi
    jz .gone
    mov qword [page], 0
    sub rsp, 8
    call vfree
    add rsp, 8
.gone:
    xor eax, eax
    ret

section .data
page: dq 0
