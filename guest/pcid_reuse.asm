; A PCID that is given to another address space without a flush still shows the first one's pages; MOV to CR3 without bit 63 flushes.
; vmemu: pcid=on
; expect: no-fault
; expect: return 0
; expect: memory stale == 0x11
; expect: memory fresh == 0x22
; expect: tlbsan "use of another address space's translation in reused"

USER equ 0x400000
PCID equ 7
section .text
init_module:
    push rbx
    push r12
    push r13
    mov rax, cr3
    mov r13, rax
    mov edi, 0x11
    call new_mm
    mov rbx, rax
    mov edi, 0x22
    call new_mm
    mov r12, rax
    stac
    mov edi, USER
    lea rax, [rbx + PCID]
    mov cr3, rax
    mov rax, [rdi]
    lea rax, [r12 + PCID]
    bts rax, 63                         ; keep what this PCID has
    mov cr3, rax
reused:
    mov rax, [rdi]
    mov [stale], rax
    lea rax, [r12 + PCID]
    mov cr3, rax
    mov rax, [rdi]
    mov [fresh], rax
    clac
    mov cr3, r13
    xor eax, eax
    pop r13
    pop r12
    pop rbx
    ret

new_mm:                                 ; an mm with the value EDI at USER
    push rbx
    push r12
    mov r12d, edi
    call vmemu_new_mm
    mov rbx, rax
    mov rdi, rbx
    mov esi, USER
    mov edx, 4096
    xor ecx, ecx
    call vmemu_map_user
    mov rax, cr3
    mov cr3, rbx
    stac
    mov ecx, USER
    mov [rcx], r12
    clac
    mov cr3, rax
    mov rax, rbx
    pop r12
    pop rbx
    ret

section .data
stale: dq 0
fresh: dq 0
