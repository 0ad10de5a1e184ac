/*
 * vfree in an interrupt handler leaves everything to a worker: until that has run the area can be read and found, and the first
 * word of the freed memory holds the worker's list.
 * vmemu: cpus=2
 * expect: return 0
 * expect: no-fault
 */
	.intel_syntax noprefix
	.text
	.globl init_module
init_module:
	push rbx
	mov edi, 4096
	call vmalloc
	mov [rip + page], rax
	mov rcx, 0x4141414141414141
	mov [rax], rcx
	mov [rax + 8], rcx
	mov edi, 0x50
	lea rsi, [rip + handler]
	xor edx, edx
	call vmemu_request_irq
	xor edi, edi
	mov esi, 0x50
	call vmemu_send_irq
1:	pause
	cmp qword ptr [rip + handled], 0
	je 1b
	mov edi, 50
	call msleep
	mov rdi, [rip + page]
	call find_vm_area
	mov ebx, 3
	test rax, rax
	jnz 2f
	mov rbx, [rip + result]
2:	mov rax, rbx
	pop rbx
	ret
handler:
	push rbx
	mov rdi, [rip + page]
	call vfree
	mov ebx, 1
	mov rdi, [rip + page]
	call find_vm_area
	test rax, rax
	jz 3f
	mov ebx, 2
	mov rax, [rip + page]
	mov rcx, 0x4141414141414141
	cmp [rax], rcx
	je 3f
	cmp [rax + 8], rcx
	jne 3f
	xor ebx, ebx
3:	mov [rip + result], rbx
	mov qword ptr [rip + handled], 1
	pop rbx
	ret
	.data
page:
	.quad 0
handled:
	.quad 0
result:
	.quad 9
