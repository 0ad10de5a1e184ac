"""The loops that tools/bench.py times. Each begins at the start of its .text and ends with HLT; RDI is memory, RCX a count."""

ALU = """
section .text
init_module:
.loop:
    add rax, rcx
    xor rdx, rax
    lea rbx, [rax + rdx*4]
    rol rax, 7
    sub rdx, rbx
    and rbx, rax
    dec rcx
    jnz .loop
    hlt
"""

STREAM = """
section .text
init_module:
    xor edx, edx
.write:
    mov [rdi + rdx*8], rdx
    inc rdx
    cmp rdx, rcx
    jne .write
    xor edx, edx
    xor eax, eax
.read:
    add rax, [rdi + rdx*8]
    inc rdx
    cmp rdx, rcx
    jne .read
    hlt
"""

TOUCH = """
section .text
init_module:
    mov rax, [rdi]
    add rdi, 4096
    dec rcx
    jnz init_module
    hlt
"""

# `set_idt` copies the IDT to RDI and loads it. `skip` faults on one page again and again, and its handler steps over the 3 bytes of
# the load; `demand` walks over absent pages, and its handler makes the next entry present: R8 lists the entries' addresses.
FAULTS = """
VECTOR_PF equ 14

section .text
init_module:
    hlt

set_idt:
    mov [idt], rdi
    sidt [old]
    mov rsi, [old + 2]
    mov ecx, 512
    xor eax, eax
.copy:
    mov rdx, [rsi + rax*8]
    mov [rdi + rax*8], rdx
    inc eax
    cmp eax, ecx
    jne .copy
    mov word [new], 4095
    mov [new + 2], rdi
    lidt [new]
    hlt

gate:                                   ; RAX: the handler of #PF from now on
    mov rdx, [idt]
    mov [rdx + VECTOR_PF*16], ax
    shr rax, 16
    mov [rdx + VECTOR_PF*16 + 6], ax
    shr rax, 16
    mov [rdx + VECTOR_PF*16 + 8], eax
    ret

skip:
    lea rax, [step_over]
    call gate
.loop:
    mov rax, [rdi]
    dec rcx
    jnz .loop
    hlt

step_over:
    add qword [rsp + 8], 3
    add rsp, 8
    iretq

demand:
    lea rax, [make_present]
    call gate
    mov [next], r8
.loop:
    mov rax, [rdi]
    add rdi, 4096
    dec rcx
    jnz .loop
    hlt

make_present:
    push rax
    push rcx
    mov rax, cr2
    mov rcx, [next]
    mov rax, [rcx]
    bts qword [rax], 0
    add rcx, 8
    mov [next], rcx
    pop rcx
    pop rax
    add rsp, 8
    iretq

section .bss
idt: resq 1
next: resq 1
old: resb 10
align 16
new: resb 10
"""
