; set_memory_nx takes the right to execute back, and no TLB keeps it.
; expect: fault #PF error=0x0011 address=[p] rip=[p]
; expect: oops
; expect: memory first == 42

section .text
init_module:
    push rbx
    mov edi, 4096
    call vmalloc
    mov rbx, rax
    mov [p], rax
    mov dword [rax], 0x00002ab8         ; mov eax, 42; ret
    mov word [rax + 4], 0xc300
    mov rdi, rax
    mov esi, 1
    call set_memory_x
    call rbx
    mov [first], rax
    mov rdi, rbx
    mov esi, 1
    call set_memory_nx
    call rbx
    pop rbx
    ret

section .bss
p: resq 1
first: resq 1
