; ud2 in kernel mode is an invalid opcode.
; expect: fault #UD rip=here
; expect: oops "invalid opcode: 0000 [#1]"

section .text
init_module:
here:
    ud2
