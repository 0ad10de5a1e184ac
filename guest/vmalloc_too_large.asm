; More than all memory is NULL, with a message that names the size.
; vmemu: memory=256M
; expect: return 0
; expect: no-fault
; expect: log "vmalloc error: size 268435456, exceeds total pages, mode:0xcc0(GFP_KERNEL)"

section .text
init_module:
    mov edi, 256 << 20
    call vmalloc
    ret
