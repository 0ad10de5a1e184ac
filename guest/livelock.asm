; Without an executable page-fault handler a fault is delivered for ever: each fetch of the handler is the next fault.
; vmemu: tlb=infinite
; expect: fault #PF error=0x0002 address=[p]+0x1000
; expect: fault #PF error=0x0010
; expect: livelock

VECTOR_PF equ 14
VECTOR_DF equ 8

section .text
init_module:
    mov edi, 4096
    call vmalloc
    mov [p], rax
    mov edi, 4096                       ; an IDT of ours
    call vmalloc
    mov rbx, rax
    sidt [old_idt]
    mov rdi, rax
    mov rsi, [old_idt + 2]
    mov edx, 4096
    call memcpy
    mov dword [rbx + VECTOR_PF*16 + 8], 0xffffc900      ; both handlers in the vmalloc region, far above all areas
    mov word [rbx + VECTOR_PF*16 + 6], 0x7000
    mov dword [rbx + VECTOR_DF*16 + 8], 0xffffc900
    mov word [rbx + VECTOR_DF*16 + 6], 0x7000
    mov word [new_idt], 4095
    mov [new_idt + 2], rbx
    lidt [new_idt]
    mov rax, [p]
    mov [rax + 0x1000], rax
    xor eax, eax
    ret

section .bss
p: resq 1
old_idt: resb 10
align 16
new_idt: resb 10
