; A read just past the end of a vmalloc area hits its guard page: not present, read, supervisor.
; expect: fault #PF error=0x0000 address=[p]+0x1000
; expect: oops "BUG: unable to handle page fault for address"
; expect: log "#PF: supervisor read access in kernel mode"
; expect: log "#PF: error_code(0x0000) - not-present page"

PAGE_SIZE equ 4096

section .text
init_module:
    mov edi, PAGE_SIZE
    call vmalloc
    mov [p], rax
    mov ecx, [rax + PAGE_SIZE - 4]      ; the last word of the page is ours
    mov ecx, [rax + PAGE_SIZE]
    xor eax, eax
    ret

section .bss
p: resq 1
