; Pushes without end reach the guard page below the stack. The page fault cannot be pushed there: double fault, on its own stack.
; expect: fault #DF error=0x0000
; expect: panic "stack guard page was hit at"
; expect: log "stack guard page: 0000 [#1]"
; expect: log "Kernel panic - not syncing: Fatal exception in interrupt"

section .text
init_module:
    push rax
    jmp init_module
