; Code at CPL 3 reads supervisor memory: page fault with P and U. The guest's own handler takes it on an IST stack.
; expect: fault #PF error=0x0005 address=[secret]
; expect: faults #PF 1
; expect: return 5

VECTOR_PF equ 14
PAGE_USER equ 4
USER_CS equ 0x33
USER_DS equ 0x2b

section .text
init_module:
    push rbx
    push rbp
    push r12
    mov edi, 4096
    call vzalloc
    mov [secret], rax
    mov edi, 4096
    call vzalloc
    mov rbx, rax                        ; the page for user code
    mov edi, 4096
    call vzalloc
    mov r12, rax                        ; the user stack

    mov rdi, rbx
    lea rsi, [user_code]
    mov edx, user_code_end - user_code
    call memcpy
    mov rdi, rbx
    call user_page
    btr qword [rax], 63                 ; executable
    invlpg [rbx]
    mov rdi, r12
    call user_page
    invlpg [r12]

    mov edi, 4096
    call vmalloc
    mov rbp, rax
    sidt [old_idt]
    mov rdi, rax
    mov rsi, [old_idt + 2]
    mov edx, 4096
    call memcpy
    lea rax, [page_fault]
    mov [rbp + VECTOR_PF*16], ax
    mov byte [rbp + VECTOR_PF*16 + 4], 1        ; IST 1: a stack that is there whatever RSP0 holds
    shr rax, 16
    mov [rbp + VECTOR_PF*16 + 6], ax
    shr rax, 16
    mov [rbp + VECTOR_PF*16 + 8], eax
    mov word [new_idt], 4095
    mov [new_idt + 2], rbp
    cli
    lidt [new_idt]

    mov [kernel_rsp], rsp
    mov rdi, [secret]
    lea rax, [r12 + 4096]
    push USER_DS
    push rax
    push 2                              ; RFLAGS, interrupts off
    push USER_CS
    push rbx
    iretq

page_fault:
    pop rax                             ; the error code is what the guest returns
    mov rsp, [kernel_rsp]
    lidt [old_idt]
    mov ecx, 0x18
    mov ss, ecx
    sti
    pop r12
    pop rbp
    pop rbx
    ret

; Set the U/S bit in the leaf of a page (the tables above it have it set); returns the address of the leaf.
user_page:
    lea rsi, [level]
    sub rsp, 8
    call lookup_address
    add rsp, 8
    or qword [rax], PAGE_USER
    ret

user_code:
    mov rax, [rdi]
    ud2
user_code_end:

section .bss
secret: resq 1
level: resq 1
kernel_rsp: resq 1
old_idt: resb 10
align 16
new_idt: resb 10
