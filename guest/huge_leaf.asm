; vmalloc_huge of 2 MiB is one leaf of 2 MiB: its frames are contiguous, all of it is there, and the guard page follows it.
; vmemu: memory=256M
; expect: fault #PF error=0x0000 address=[p]+0x200000
; expect: oops "BUG: unable to handle page fault for address"
; expect: memory leaf_level == 2
; expect: memory frames == 511
; expect: memory touched == 512

PMD_SIZE equ 2 << 20
GFP_KERNEL equ 0xcc0

section .text
init_module:
    push rbx
    mov edi, PMD_SIZE
    mov esi, GFP_KERNEL
    call vmalloc_huge
    mov [p], rax
    mov rbx, rax
    mov rdi, rax
    lea rsi, [leaf_level]               ; an unsigned int: the upper half stays 0
    call lookup_address
    mov rdi, rbx
    call vmalloc_to_pfn
    mov [frames], rax
    lea rdi, [rbx + PMD_SIZE - 4096]
    call vmalloc_to_pfn
    sub rax, [frames]
    mov [frames], rax
    xor ecx, ecx
.touch:
    mov rdx, rcx
    shl rdx, 12
    mov [rbx + rdx], rcx
    cmp [rbx + rdx], rcx
    jne .done
    inc rcx
    cmp ecx, 512
    jne .touch
.done:
    mov [touched], rcx
    mov al, [rbx + PMD_SIZE]
    pop rbx
    ret

section .bss
p: resq 1
leaf_level: resq 1
frames: resq 1
touched: resq 1
