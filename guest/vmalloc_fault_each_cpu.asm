; Before 5.8: an mm that is older than a top-level entry of the vmalloc region faults when it first needs it, on whichever CPU; the
; handler copies the entry, and the mm never faults there again.
; vmemu: kernel=5.4 cpus=2
; expect: fault #PF error=0x0000 address=[p] rip=touch0
; expect: fault #PF error=0x0000 address=[p] rip=touch1
; expect: faults #PF 2
; expect: return 0

section .text
init_module:
    push rbx
    call vmemu_new_mm
    mov [older], rax
    call vmemu_new_mm
    mov [other], rax
more:                                   ; a per-CPU chunk at the top of the vmalloc region
    mov edi, 32768
    mov esi, 4096
    call __alloc_percpu
    mov rdi, rax
    xor esi, esi
    call per_cpu_ptr
    mov [p], rax
    mov rdi, rax
    call is_vmalloc_addr
    test eax, eax
    jz more
    mov rdi, [older]
    call vmemu_switch_mm
    mov rcx, [p]
touch0:
    mov rax, [rcx]
    mov rax, [rcx]
    mov rax, [rcx + 4096]
    mov edi, 1
    lea rsi, [second]
    xor edx, edx
    call vmemu_run_on
    mov rdi, rax
    call vmemu_join
    pop rbx
    ret
second:
    sub rsp, 8
    mov rdi, [older]                      ; the first one's mm: it has the entry
    call vmemu_switch_mm
    mov rcx, [p]
    mov rax, [rcx]
    mov rdi, [other]
    call vmemu_switch_mm
    mov rcx, cr4                        ; that translation is global: without this the TLB would spare the fault
    mov rdx, rcx
    xor rdx, 0x80
    mov cr4, rdx
    mov cr4, rcx
    mov rcx, [p]
touch1:
    mov rax, [rcx]
    mov rax, [rcx]
    xor eax, eax
    add rsp, 8
    ret

section .data
p: dq 0
older: dq 0
other: dq 0
