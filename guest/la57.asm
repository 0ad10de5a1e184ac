; With 5-level paging vmalloc gives addresses that only 57 bits can hold: bit 47 does not fill the bits above it.
; vmemu: levels=5
; expect: return 57
; expect: no-fault
; expect: memory [p] == 0x1234

CR4_LA57 equ 1 << 12

section .text
init_module:
    mov rax, cr4
    test eax, CR4_LA57
    jz .fail
    mov edi, 4096
    call vmalloc
    mov [p], rax
    mov qword [rax], 0x1234
    mov rcx, rax
    shl rcx, 16
    sar rcx, 16
    cmp rcx, rax
    je .fail                            ; canonical for 48 bits
    mov rcx, rax
    shl rcx, 7
    sar rcx, 7
    cmp rcx, rax
    jne .fail                           ; not canonical for 57 bits
    mov eax, 57
    ret
.fail:
    xor eax, eax
    ret

section .bss
p: resq 1
