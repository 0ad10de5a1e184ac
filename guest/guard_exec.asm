; A jump into the guard page is an instruction fetch from a page that is not present; RIP is its address.
; expect: fault #PF error=0x0010 address=[p]+0x1000 rip=[p]+0x1000
; expect: oops "BUG: unable to handle page fault for address"
; expect: log "#PF: supervisor instruction fetch in kernel mode"
; expect: log "#PF: error_code(0x0010) - not-present page"

section .text
init_module:
    mov edi, 4096
    call vmalloc
    mov [p], rax
    add rax, 4096
    call rax
    xor eax, eax
    ret

section .bss
p: resq 1
