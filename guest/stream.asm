; 64 MiB of vmalloc memory written and read back in order: 16384 pages of 4 KiB, every word checked.
; vmemu: memory=256M
; expect: return 0
; expect: no-fault
; expect: memory sum == 0x1fffffc00000

SIZE equ 64 << 20

section .text
init_module:
    push rbx
    mov edi, SIZE
    call vmalloc
    mov rbx, rax
    xor ecx, ecx
.write:
    mov [rbx + rcx*8], rcx
    inc rcx
    cmp rcx, SIZE / 8
    jne .write
    xor ecx, ecx
    xor eax, eax
.read:
    add rax, [rbx + rcx*8]
    inc rcx
    cmp rcx, SIZE / 8
    jne .read
    mov [sum], rax
    mov rdi, rbx
    call vfree
    xor eax, eax
    pop rbx
    ret

section .bss
sum: resq 1
