; An access that begins in the last page and ends in the guard page reports the first byte of the guard page in CR2.
; expect: fault #PF error=0x0002 address=[p]+0x1000
; expect: oops
; expect: memory [p]+0xff8 == 0x1111111111111111

section .text
init_module:
    mov edi, 4096
    call vzalloc
    mov [p], rax
    mov rcx, 0x1111111111111111
    mov [rax + 4096 - 8], rcx
    not rcx
    mov [rax + 4096 - 4], rcx           ; none of its eight bytes is written
    xor eax, eax
    ret

section .bss
p: resq 1
