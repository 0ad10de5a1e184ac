; A guest's own page-fault handler makes 64 absent pages present, one fault each, and every access that faulted then works.
; expect: fault #PF error=0x0002 address=[p]
; expect: fault #PF error=0x0002 address=[p]+0x3f000
; expect: faults #PF 64
; expect: return 64
; expect: memory [p]+0x3f000 == 63

PAGES equ 64
VECTOR_PF equ 14
PAGE_PRESENT equ 1

section .text
init_module:
    push rbx
    push r12
    sub rsp, 8
    mov edi, PAGES * 4096
    call vzalloc
    mov [p], rax
    mov rbx, rax
    xor r12d, r12d
.collect:                               ; where the entry of each page is
    mov rdi, rbx
    lea rsi, [level]
    call lookup_address
    lea rcx, [ptes]
    mov [rcx + r12*8], rax
    add rbx, 4096
    inc r12d
    cmp r12d, PAGES
    jne .collect

    mov edi, 4096                       ; a copy of the IDT with a page-fault gate of ours
    call vmalloc
    mov rbx, rax
    sidt [old_idt]
    mov rdi, rax
    mov rsi, [old_idt + 2]
    mov edx, 4096
    call memcpy
    lea rax, [page_fault]
    mov [rbx + VECTOR_PF*16], ax
    shr rax, 16
    mov [rbx + VECTOR_PF*16 + 6], ax
    shr rax, 16
    mov [rbx + VECTOR_PF*16 + 8], eax
    mov word [new_idt], 4095
    mov [new_idt + 2], rbx
    cli
    lidt [new_idt]

    xor ecx, ecx                        ; make every page absent
    mov rbx, [p]
    lea rdx, [ptes]
.unmap:
    mov rax, [rdx + rcx*8]
    btr qword [rax], 0
    invlpg [rbx]
    add rbx, 4096
    inc ecx
    cmp ecx, PAGES
    jne .unmap

    xor ecx, ecx
    mov rbx, [p]
.touch:
    mov [rbx], rcx
    cmp [rbx], rcx
    jne .out
    add rbx, 4096
    inc ecx
    cmp ecx, PAGES
    jne .touch
.out:
    lidt [old_idt]
    sti
    mov eax, [handled]
    add rsp, 8
    pop r12
    pop rbx
    ret

page_fault:
    push rax
    push rcx
    mov rax, cr2
    sub rax, [p]
    shr rax, 12
    lea rcx, [ptes]
    mov rax, [rcx + rax*8]
    or qword [rax], PAGE_PRESENT        ; an absent entry is in no TLB: nothing to invalidate
    inc dword [handled]
    pop rcx
    pop rax
    add rsp, 8                          ; the error code
    iretq

section .bss
p: resq 1
level: resq 1
handled: resq 1
old_idt: resb 10
align 16
new_idt: resb 10
align 16
ptes: resq PAGES
