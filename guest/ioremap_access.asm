; ioremap maps addresses where no RAM is; no device answers, so the CPU's access ends the machine.
; expect: bus-error
; expect: no-fault

section .text
init_module:
    mov edi, 0xfed00000
    mov esi, 4096
    call ioremap
    mov eax, [rax]
    ret
