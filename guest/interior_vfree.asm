; vfree of any page of an area frees all of it, without a word; the first page is gone too.
; expect: fault #PF error=0x0000 address=[p]
; expect: oops "BUG: unable to handle page fault for address"
; expect: no-log "Trying to vfree()"

section .text
init_module:
    mov edi, 3 * 4096
    call vmalloc
    mov [p], rax
    lea rdi, [rax + 4096]
    call vfree
    call vm_unmap_aliases
    mov rax, [p]
    mov al, [rax]
    xor eax, eax
    ret

section .bss
p: resq 1
