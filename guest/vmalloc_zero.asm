; vmalloc(0) is NULL with a warning.
; expect: return 0
; expect: log "WARNING: CPU: 0 PID: 100 at mm/vmalloc.c:3838 __vmalloc_node_range_noprof+0x"

section .text
init_module:
    xor edi, edi
    call vmalloc
    ret
