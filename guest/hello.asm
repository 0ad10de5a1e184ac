; The smallest guest: one line in the kernel log.
; vmemu: levels=4
; expect: return 0
; expect: log "hello from the guest"
; expect: no-fault

section .text
init_module:
    lea rdi, [message]
    xor eax, eax                ; no vector registers for the variable arguments
    call _printk
    xor eax, eax
    ret

section .rodata
message: db "\x01", "6hello from the guest\n", 0
