/*
 * A thread on CPU 1 is interrupted by a vector that this guest handles; its handler runs in hard interrupt context.
 * vmemu: cpus=2
 * expect: return 49
 * expect: no-fault
 */
	.intel_syntax noprefix
	.text
	.globl init_module
init_module:
	push rbx
	mov edi, 0x50
	lea rsi, [rip + handler]
	mov edx, 7
	call vmemu_request_irq
	mov edi, 1
	lea rsi, [rip + thread]
	mov edx, 35
	call vmemu_run_on
	mov rbx, rax
	mov edi, 1
	mov esi, 0x50
	call vmemu_send_irq
	mov rdi, rbx
	call vmemu_join
	pop rbx
	ret
thread:
	pause
	cmp qword ptr [rip + seen], 0
	je thread
	mov rax, rdi
	add rax, [rip + seen]
	ret
handler:
	push rsi
	call vmemu_in_interrupt
	pop rsi
	shl rsi, 1
	imul rax, rsi
	mov [rip + seen], rax
	ret
	.data
seen:
	.quad 0
