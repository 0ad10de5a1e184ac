; With an empty IDT no exception can be delivered, nor the double fault that follows: the machine stops.
; expect: triple-fault

section .text
init_module:
    cli
    lidt [no_idt]
    ud2

section .rodata
no_idt:
    dw 0
    dq 0
