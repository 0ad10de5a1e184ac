; Before 5.8: an NMI handler may take the vmalloc fault, too. It comes between two loads of a page whose top-level entry the mm lacks
; and faults in the interrupted code's stead; no warning, and the interrupted code does not fault again.
; vmemu: kernel=5.4 cpus=2 schedule=0@2000!nmi
; expect: fault #PF error=0x0000 address=[p] rip=nmi_touch
; expect: faults #PF 1
; expect: memory nmis == 1
; expect: no-log "WARNING"
; expect: return 0

section .text
init_module:
    push rbx
    call vmemu_new_mm
    mov rbx, rax
more:
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
    lea rdi, [handler]
    xor esi, esi
    call vmemu_request_nmi
    mov rdi, rbx
    call vmemu_switch_mm
wait_nmi:
    cmp qword [nmis], 0
    je wait_nmi
    mov rcx, [p]
    mov rax, [rcx]
    xor eax, eax
    pop rbx
    ret
handler:
    mov rcx, [p]
nmi_touch:
    mov rax, [rcx]
    inc qword [nmis]
    mov eax, 1
    ret

section .data
p: dq 0
nmis: dq 0
