; CPU 1's user of an mm sleeps and a kernel thread goes on with that mm, lazily: it is sent no flush when CPU 0 unmaps a page. When
; the user comes back, CPU 1 catches up before that runs, and its next access faults.
; vmemu: cpus=2
; expect: fault #PF error=0x0000 address=0x400000 rip=touch
; expect: faults #PF 1
; expect: oops
; expect: memory unmapped == 1
; expect: count ipi 0

USER equ 0x400000
section .text
init_module:
    push rbx
    call vmemu_new_mm
    mov [mm], rax
    mov rdi, rax
    mov esi, USER
    mov edx, 4096
    xor ecx, ecx
    call vmemu_map_user
    mov edi, 1
    lea rsi, [user]
    xor edx, edx
    call vmemu_run_on
    mov rbx, rax
lazy_wait:
    pause
    cmp qword [lazy], 0
    je lazy_wait
    mov rdi, [mm]
    mov esi, USER
    mov edx, 4096
    call vmemu_unmap_user
    mov qword [unmapped], 1
    mov rdi, rbx
    call vmemu_join
    pop rbx
    ret
user:
    sub rsp, 8
    mov rdi, [mm]
    call vmemu_switch_mm
    stac
    mov rax, [USER]
    clac
    mov edi, 1
    lea rsi, [kernel_thread]
    xor edx, edx
    call vmemu_run_on
    mov rdi, rax
    call vmemu_join
    stac
touch:
    mov rax, [USER]
    clac
    add rsp, 8
    ret
kernel_thread:
    mov qword [lazy], 1
unmapped_wait:
    pause
    cmp qword [unmapped], 0
    je unmapped_wait
    ret

section .data
mm: dq 0
lazy: dq 0
unmapped: dq 0
