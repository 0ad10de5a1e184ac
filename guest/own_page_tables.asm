; A guest that clears the entry that maps its own code, and invalidates it, faults on its next instruction fetch.
; expect: fault #PF error=0x0010 address=next rip=next
; expect: oops "BUG: unable to handle page fault for address"
; expect: log "#PF: supervisor instruction fetch in kernel mode"

section .text
init_module:
    lea rdi, [next]
    lea rsi, [level]
    sub rsp, 8
    call lookup_address
    add rsp, 8
    lea rdi, [next]
    mov qword [rax], 0
    invlpg [rdi]
    jmp next                            ; another page
align 4096
next:
    xor eax, eax
    ret

section .bss
level: resq 1
