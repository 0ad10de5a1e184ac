; vmalloc memory is not executable: present, instruction fetch.
; expect: fault #PF error=0x0011 address=[p] rip=[p]
; expect: oops "BUG: unable to handle page fault for address"
; expect: log "kernel tried to execute NX-protected page - exploit attempt?"
; expect: log "#PF: error_code(0x0011) - permissions violation"

section .text
init_module:
    mov edi, 4096
    call vmalloc
    mov [p], rax
    mov byte [rax], 0xc3                ; ret
    call rax
    xor eax, eax
    ret

section .bss
p: resq 1
