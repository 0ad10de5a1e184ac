; Linux has six ASIDs on a CPU: the seventh mm takes one over, which is flushed then. Each of eight mms, loaded twice in turn, shows
; its own page; one that has kept its ASID is not flushed.
; vmemu: pcid=on
; expect: no-fault
; expect: return 0

USER equ 0x400000
MMS equ 8
section .text
init_module:
    push rbx
    push r12
    xor ebx, ebx
make:
    call vmemu_new_mm
    mov [mms + rbx * 8], rax
    mov rdi, rax
    mov esi, USER
    mov edx, 4096
    xor ecx, ecx
    call vmemu_map_user
    mov rdi, [mms + rbx * 8]
    call vmemu_switch_mm
    stac
    mov ecx, USER
    mov [rcx], rbx
    clac
    inc ebx
    cmp ebx, MMS
    jne make
    mov r12d, 2
again:
    xor ebx, ebx
look:
    mov rdi, [mms + rbx * 8]
    call vmemu_switch_mm
    stac
    mov ecx, USER
    mov rax, [rcx]
    clac
    cmp rax, rbx
    jne wrong
    inc ebx
    cmp ebx, MMS
    jne look
    dec r12d
    jnz again
    call vmemu_init_mm
    mov rdi, rax
    call vmemu_switch_mm
    xor ebx, ebx
end:
    mov rdi, [mms + rbx * 8]
    call vmemu_destroy_mm
    test eax, eax
    jnz wrong
    inc ebx
    cmp ebx, MMS
    jne end
    xor eax, eax
    jmp out
wrong:
    mov eax, 1
out:
    pop r12
    pop rbx
    ret

section .bss
mms: resq MMS
