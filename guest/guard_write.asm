; A write past the end of a three-page area is a write to a page that is not present.
; expect: fault #PF error=0x0002 address=[p]+0x3008
; expect: oops "BUG: unable to handle page fault for address"
; expect: log "#PF: supervisor write access in kernel mode"
; expect: log "#PF: error_code(0x0002) - not-present page"

SIZE equ 3 * 4096

section .text
init_module:
    mov edi, SIZE
    call vmalloc
    mov [p], rax
    mov qword [rax + SIZE + 8], 1
    xor eax, eax
    ret

section .bss
p: resq 1
