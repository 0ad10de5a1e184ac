/*
 * rep movsb with the direction flag set copies overlapping memory across a page boundary without loss.
 * expect: return 0
 * expect: no-fault
 */
	.text
	.globl init_module
init_module:
	pushq %rbx
	movl $(3 * 4096), %edi
	call vzalloc
	movq %rax, %rbx
	xorl %ecx, %ecx
1:	movb %cl, 100(%rbx, %rcx)
	incl %ecx
	cmpl $8000, %ecx
	jne 1b
	leaq 100 + 7999(%rbx), %rsi
	leaq 200 + 7999(%rbx), %rdi
	movl $8000, %ecx
	std
	rep movsb
	cld
	xorl %ecx, %ecx
	xorl %eax, %eax
2:	cmpb %cl, 200(%rbx, %rcx)
	setne %dl
	movzbl %dl, %edx
	addl %edx, %eax
	incl %ecx
	cmpl $8000, %ecx
	jne 2b
	popq %rbx
	ret
	.section .note.GNU-stack,"",@progbits
