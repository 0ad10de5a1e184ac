; A guest that never returns is stopped at its instruction limit.
; vmemu: max-instructions=100000
; expect: limit

section .text
init_module:
    jmp $
