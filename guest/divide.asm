; A division by zero is #DE, and its RIP is the division's.
; expect: fault #DE rip=division
; expect: oops "divide error: 0000 [#1]"

section .text
init_module:
    mov eax, 1
    xor edx, edx
    xor ecx, ecx
division:
    div ecx
    ret
