"""Random guests that do right: several CPUs map, touch, change, unmap and purge, and none uses what it may not use any more.

What is one CPU's own, only that CPU touches. What is shared passes from round to round at barriers: made by one CPU, touched by
all, changed or freed by another. So every TLB fills with entries that go stale, and no report of TLBSan is right.
"""

from __future__ import annotations

from random import Random

_KERNELS = ("6.12", "6.12", "6.1", "5.4")
_ROUTINES = """
reads:
    mov rcx, [rdi]
    add rdi, 4096
    dec esi
    jnz reads
    ret
writes:
    mov qword [rdi + 8], 1
    add rdi, 4096
    dec esi
    jnz writes
    ret
; vm_map_ram of the esi pages at rdi, whose struct pages go to rdx
map_ram:
    push rbx
    push r12
    push r13
    push rsi
    mov rbx, rdi
    mov r12, rdx
    mov r13d, esi
map_next:
    mov rdi, rbx
    call vmalloc_to_page
    mov [r12], rax
    add r12, 8
    add rbx, 4096
    dec r13d
    jnz map_next
    pop rsi
    mov rdi, rsi
    shl rdi, 3
    neg rdi
    add rdi, r12
    mov edx, -1
    call vm_map_ram
    pop r13
    pop r12
    pop rbx
    ret
"""


class _Writer:
    def __init__(self, random: Random, cpus: int) -> None:
        self.random = random
        self.cpus = cpus
        self.code: list[list[str]] = [[] for _ in range(cpus)]
        self.words = 0
        self.barriers = 0
        # Of each CPU: where its own areas stand, their pages, whether they are mapped once more.
        self.own: list[list[tuple[str, int, str]]] = [[] for _ in range(cpus)]

    def word(self, count: int = 1) -> str:
        self.words += count
        return f"[words + {8 * (self.words - count)}]"

    def call(self, cpu: int, function: str, where: str, *numbers: int) -> None:
        registers = ("esi", "edx")
        self.code[cpu] += [f"mov rdi, {where}", *(f"mov {r}, {n}" for r, n in zip(registers, numbers, strict=False))]
        self.code[cpu].append(f"call {function}")

    def allocate(self, cpu: int, where: str, pages: int) -> None:
        function = self.random.choice(("vmalloc", "vzalloc"))
        self.code[cpu] += [f"mov edi, {4096 * pages}", f"call {function}", f"mov {where}, rax"]

    def touch(self, cpu: int, where: str, pages: int, writes: bool) -> None:
        self.call(cpu, "writes" if writes and self.random.random() < 0.5 else "reads", where, pages)

    def barrier(self) -> None:
        self.barriers += 1
        word = self.word()
        for cpu, code in enumerate(self.code):
            label = f"wait_{self.barriers}_{cpu}"
            code += [f"lock inc qword {word}", f"{label}:", "pause", f"cmp qword {word}, {self.cpus}", f"jne {label}"]

    def alone(self, cpu: int) -> None:
        """Something that only one CPU has to do with."""
        random, own = self.random, self.own[cpu]
        match random.randrange(6):
            case 0 | 1:
                where, pages = self.word(), random.choice((1, 2, 3, 8, 36))
                self.allocate(cpu, where, pages)
                self.touch(cpu, where, pages, True)
                own.append((where, pages, ""))
            case 2 if own:
                self.free(cpu, own.pop(random.randrange(len(own))))
            case 3 if own:
                where, pages, alias = own[-1]
                if not alias and pages <= 8:
                    alias, array = self.word(), self.word(pages)
                    self.code[cpu] += [
                        f"mov rdi, {where}", f"mov esi, {pages}", f"lea rdx, {array}", "call map_ram", f"mov {alias}, rax",
                    ]
                    own[-1] = where, pages, alias
                self.touch(cpu, alias or where, pages, True)
            case 4 if random.random() < 0.4:
                self.code[cpu].append("call vm_unmap_aliases")
            case _ if own:
                where, pages, _ = random.choice(own)
                self.touch(cpu, where, pages, True)

    def free(self, cpu: int, area: tuple[str, int, str]) -> None:
        where, pages, alias = area
        if alias:
            self.call(cpu, "vm_unmap_ram", alias, pages)
        self.call(cpu, "vfree", where)

    def round(self) -> None:
        """An area that all CPUs share, from its birth to its end."""
        random = self.random
        where, pages = self.word(), random.choice((1, 2, 5, 34))
        self.allocate(random.randrange(self.cpus), where, pages)
        self.meanwhile()
        self.barrier()
        self.everybody(where, pages, True)
        self.barrier()
        if random.random() < 0.4:
            changer = random.randrange(self.cpus)
            self.call(changer, "set_memory_ro", where, pages)
            self.meanwhile()
            self.barrier()
            self.everybody(where, pages, False)
            self.barrier()
            # Rights that were widened need no flush to be used: whoever still has the old ones faults and looks again.
            self.call(random.randrange(self.cpus), "set_memory_rw", where, pages)
            self.barrier()
            self.everybody(where, pages, True)
            self.barrier()
        last = random.randrange(self.cpus)
        self.call(last, "vfree", where)
        if random.random() < 0.5:
            self.code[last].append("call vm_unmap_aliases")
        self.meanwhile()

    def everybody(self, where: str, pages: int, writes: bool) -> None:
        for cpu in range(self.cpus):
            for _ in range(self.random.randrange(1, 3)):
                self.touch(cpu, where, pages, writes)

    def meanwhile(self) -> None:
        for cpu in range(self.cpus):
            for _ in range(self.random.randrange(3)):
                self.alone(cpu)

    def text(self, header: str) -> str:
        lines = [f"; vmemu: cpus={self.cpus} {header}", "; expect: return 0", "section .text", "init_module:"]
        for cpu in range(1, self.cpus):
            lines += [f"mov edi, {cpu}", f"lea rsi, [body_{cpu}]", "xor edx, edx", "call vmemu_run_on"]
            lines.append(f"mov [handles + {8 * cpu}], rax")
        lines.append("call body_0")
        for cpu in range(1, self.cpus):
            lines += [f"mov rdi, [handles + {8 * cpu}]", "call vmemu_join"]
        lines += ["xor eax, eax", "ret"]
        for cpu, code in enumerate(self.code):
            lines += [f"body_{cpu}:", *code, "ret"]
        lines += [_ROUTINES, "section .bss", f"handles: resq {self.cpus}", f"words: resq {self.words}"]
        return "\n".join(lines) + "\n"


def random_guest(seed: int) -> str:
    """The source of a guest (assembly), the same for the same seed: 2 to 8 CPUs, a kernel version, a way of flushing."""
    random = Random(seed)
    writer = _Writer(random, random.choice((2, 2, 3, 4, 8)))
    kernel = random.choice(_KERNELS)
    way = random.choice(("", "", "pcid=on", "pti=on", "pti=on pcid=on", "debug-pagealloc=on", "tlb=finite"))
    if not way and kernel == "6.12" and random.random() < 0.3:
        way = "invlpgb=on"
    for _ in range(random.randint(2, 5)):
        writer.round()
    return writer.text(f"kernel={kernel} memory=128M seed={seed} {way}".rstrip())
