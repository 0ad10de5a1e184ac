; ioremap refuses RAM that the kernel uses, with a warning.
; expect: return 0
; expect: log "ioremap on RAM at 0x0000000002000000 - 0x0000000002000fff"
; expect: log "at arch/x86/mm/ioremap.c:217 __ioremap_caller+0x"

section .text
init_module:
    mov edi, 0x2000000
    mov esi, 4096
    call ioremap
    ret
