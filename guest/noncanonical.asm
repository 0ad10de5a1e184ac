; An address whose upper bits are not copies of bit 47 is a general protection fault, not a page fault.
; vmemu: levels=4
; expect: fault #GP error=0x0000
; expect: oops "general protection fault, probably for non-canonical address 0xdeadc90000000000"
; expect: faults #PF 0

section .text
init_module:
    mov rax, 0xdeadc90000000000
    mov rax, [rax]
    ret
