; With page-table isolation user mode runs on tables without vmalloc memory: reading it there is a fault without P, unlike what
; the kernel tells the program. The kernel is entered and left by its own tables: int 0x80 returns -ENOSYS.
; vmemu: pti=on
; expect: fault #PF error=0x0004 address=[secret] rip=0x400002
; expect: faults #PF 1
; expect: log "error 5"
; expect: signal

USER equ 0x400000
STACK equ 0x600000
section .text
init_module:
    push rbx
    mov edi, 4096
    call vzalloc
    mov [secret], rax
    call vmemu_new_mm
    mov rbx, rax
    mov rdi, rbx
    mov esi, USER
    mov edx, 4096
    mov ecx, 1                          ; executable
    call vmemu_map_user
    mov rdi, rbx
    mov esi, STACK
    mov edx, 4096
    xor ecx, ecx
    call vmemu_map_user

    mov cr3, rbx                        ; the kernel's half of the pair: it may write user memory, not execute it
    stac
    mov edi, USER
    lea rsi, [user_code]
    mov edx, user_code_end - user_code
    call memcpy
    clac

    mov rdi, rbx
    mov esi, USER
    mov edx, STACK + 4096
    mov r12, [secret]
    call vmemu_enter_user
    pop rbx
    ret

user_code:
    int 0x80
    mov rax, [r12]
    ud2
user_code_end:

section .bss
secret: resq 1
