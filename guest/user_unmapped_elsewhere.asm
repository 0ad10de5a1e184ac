; CPU 1 runs user code; CPU 0 unmaps the page that it reads. One function-call IPI flushes it on CPU 1, and user mode faults.
; vmemu: cpus=2
; expect: fault #PF error=0x0004 address=0x402000
; expect: faults #PF 1
; expect: signal
; expect: count ipi 1

CODE equ 0x400000
DATA equ 0x402000
TOLD equ 0x403000
STACK equ 0x404000
section .text
init_module:
    push rbx
    call vmemu_new_mm
    mov rbx, rax
    mov [mm], rax
    mov rdi, rbx
    mov esi, CODE
    mov edx, 0x5000
    mov ecx, 1                          ; executable
    call vmemu_map_user
    mov rdi, rbx
    call vmemu_switch_mm
    stac
    mov edi, CODE
    lea rsi, [user_code]
    mov edx, user_code_end - user_code
    call memcpy
    clac
    call vmemu_init_mm
    mov rdi, rax
    call vmemu_switch_mm
    mov edi, 1
    lea rsi, [second]
    xor edx, edx
    call vmemu_run_on
    mov rdi, rbx
    call vmemu_switch_mm
running:
    pause
    stac
    mov ecx, TOLD
    mov rax, [rcx]                       ; user mode tells that it has read the page
    clac
    test rax, rax
    jz running
    mov rdi, rbx
    mov esi, DATA
    mov edx, 4096
    call vmemu_unmap_user
spin:
    pause
    jmp spin
second:
    mov rdi, [mm]
    mov esi, CODE
    mov edx, STACK + 4096
    call vmemu_enter_user
    ret

user_code:
    mov ecx, DATA
.loop:
    mov rax, [rcx]
    mov qword [rcx + TOLD - DATA], 1
    jmp .loop
user_code_end:

section .data
mm: dq 0
