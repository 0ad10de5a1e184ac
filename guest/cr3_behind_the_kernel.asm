; A CPU that loads an mm by MOV to CR3, not by a switch of mms, is unknown to the mm's flushes: CPU 1 still reads the page that CPU 0
; has unmapped and freed.
; vmemu: cpus=2
; expect: no-fault
; expect: return 0x77
; expect: count ipi 0
; expect: tlbsan "use-after-unmap in unmapped_wait"

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
touched_wait:
    pause
    cmp qword [touched], 0
    je touched_wait
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
    mov rax, cr3
    mov rdx, [mm]
    mov cr3, rdx
    stac
    mov edi, USER
    mov qword [rdi], 0x77
    mov qword [touched], 1
unmapped_wait:
    pause
    cmp qword [unmapped], 0
    je unmapped_wait
    mov rcx, [rdi]
    clac
    mov cr3, rax
    mov rax, rcx
    ret

section .data
mm: dq 0
touched: dq 0
unmapped: dq 0
