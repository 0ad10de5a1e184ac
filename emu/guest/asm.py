"""Assemble .asm guests: our own preprocessor (sections, labels, data, constants) around Keystone's encoder.

docs/guests.md describes the dialect. Sections other than .text hold no instructions, so their layout is known as they are read
and label differences in them are constants; .text is laid out when every instruction has its bytes.
"""

from __future__ import annotations

import re
from dataclasses import replace

from emu.guest.asm_encode import PREFIXES, BadInstruction, Encoded, Fixup, Instruction, encode, encode_branch, is_branch
from emu.guest.asm_expression import Linear, Malformed, parse_expression, unescape
from emu.guest.asm_layout import Align, Item, Layout, OpenSection
from emu.guest.asm_operand import REGISTERS, SIZES, Imm, Mem, Operand, parse_operand
from emu.guest.directives import parse_directives
from emu.guest.error import GuestError
from emu.guest.program import MAX_ALIGN, MAX_SECTION_SIZE, Program, RelocationType, SectionKind, align_up

MAX_LINES = 100_000
MAX_LINE = 4096
# Bytes that a source may spell out in a section; .bss may be larger.
MAX_DATA_SIZE = 4 << 20

_SECTIONS = {
    ".text": (SectionKind.TEXT, 16),
    ".rodata": (SectionKind.RODATA, 16),
    ".data": (SectionKind.DATA, 16),
    ".bss": (SectionKind.BSS, 16),
    ".data..ro_after_init": (SectionKind.RO_AFTER_INIT, 16),
}
_DATA = {"db": 1, "dw": 2, "dd": 4, "dq": 8}
_RESERVE = {"resb": 1, "resw": 2, "resd": 4, "resq": 8}
_IDENTIFIER = r"[A-Za-z_.?][\w.$?]*"
_LABEL = re.compile(rf"\s*({_IDENTIFIER})\s*:(?!:)", re.ASCII)
_BARE_LABEL = re.compile(rf"\s*({_IDENTIFIER})\s+(?=(?:db|dw|dd|dq|resb|resw|resd|resq|equ)\b)", re.ASCII | re.IGNORECASE)
_WORD = re.compile(r"\s*([A-Za-z][\w.]*)\s*", re.ASCII)
_MAX_CHAIN = 32
# Words of the syntax; as names they would be typing errors.
_RESERVED = frozenset([*SIZES, "ptr", "offset", "rel", "short", "near", "far", "strict", "dup", "equ"])


def assemble(text: str, path: str) -> Program:
    """The program in an .asm source. `path` is for messages. Raises GuestError only."""
    directives = parse_directives(text, path, "asm")
    assembler = _Assembler(path)
    lines = text.split("\n")
    if len(lines) > MAX_LINES:
        raise GuestError(path, MAX_LINES, f"more than {MAX_LINES} lines")
    for number, line in enumerate(lines, 1):
        try:
            assembler.line(number, line)
        except Malformed as problem:
            raise GuestError(path, number, str(problem)) from None
    try:
        program = assembler.finish()
    except BadInstruction as problem:
        raise GuestError(path, problem.line, str(problem)) from None
    return replace(program, directives=directives)


def strip_comment(line: str) -> str:
    """The line up to a `;` outside quotes. Raises Malformed for an open quote."""
    quote = ""
    escaped = False
    for at, char in enumerate(line):
        if quote:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        elif char == ";":
            return line[:at]
    if quote:
        raise Malformed(f"{quote} is not closed")
    return line


def _split(text: str) -> list[str]:
    """Split at commas outside quotes, brackets and parentheses."""
    pieces: list[str] = []
    depth, quote, start, escaped = 0, "", 0, False
    for at, char in enumerate(text):
        if quote:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == quote:
                quote = ""
        elif char in "'\"":
            quote = char
        elif char in "[(":
            depth += 1
        elif char in "])":
            depth -= 1
        elif char == "," and depth == 0:
            pieces.append(text[start:at])
            start = at + 1
    pieces.append(text[start:])
    return pieces


class _Assembler:
    def __init__(self, path: str) -> None:
        self.path = path
        self.sections = [OpenSection(name, kind, align) for name, (kind, align) in _SECTIONS.items()]
        self.current = self.sections[0]
        self.labels: dict[str, tuple[OpenSection, int]] = {}
        self.constants: dict[str, Linear] = {}
        self.globals: dict[str, int] = {}
        self.externs: dict[str, int] = {}
        self.parent = ""
        self.first_label: str | None = None
        self.here = 0

    # Lines.

    def line(self, number: int, raw: str) -> None:
        if len(raw) > MAX_LINE:
            raise Malformed(f"line of {len(raw)} characters is too long")
        rest = strip_comment(raw).strip()
        if "\0" in rest:
            raise Malformed("NUL byte in the source")
        match = _LABEL.match(rest)
        if match and match[1].lower() not in REGISTERS:
            self._define(self._qualified(match[1], define=True))
            rest = rest[match.end() :].strip()
        bare = _BARE_LABEL.match(rest)
        if bare and bare[1].lower() not in (*_DATA, *_RESERVE, "times", "align"):
            rest = rest[bare.end() :]
            name = self._qualified(bare[1], define=True)
            if rest[:3].lower() == "equ":
                self._equ(name, rest[3:])
                return
            self._define(name)
        if not rest:
            return
        word = _WORD.match(rest)
        if not word:
            raise Malformed(f"cannot read {rest[:60]!r}")
        self._statement(number, word[1].lower(), rest[word.end() :].strip())

    def _statement(self, number: int, word: str, rest: str) -> None:
        if word in _DATA:
            self._put(number, self._data(_DATA[word], rest))
        elif word in _RESERVE:
            self._reserve(number, self._count(rest) * _RESERVE[word])
        elif word == "align":
            self._align(number, self._count(rest))
        elif word == "times":
            self._times(number, rest)
        elif word == "section":
            self._section(rest)
        elif word in ("global", "extern"):
            names = [n.strip() for n in rest.split(",")]
            for name in names:
                if not re.fullmatch(_IDENTIFIER, name, re.ASCII):
                    raise Malformed(f"{word} needs names, not {name!r}")
                (self.globals if word == "global" else self.externs)[name] = number
        elif (word == "default" and rest.lower() == "rel") or (word == "bits" and rest == "64"):
            return
        else:
            self._instruction(number, word, rest)

    def _section(self, name: str) -> None:
        if name not in _SECTIONS:
            raise Malformed(f"unknown section {name!r} (known: {', '.join(_SECTIONS)})")
        self.current = next(s for s in self.sections if s.name == name)

    # Names.

    def _qualified(self, name: str, define: bool = False) -> str:
        """`.name` belongs to the last label that does not start with a dot."""
        if name.startswith("."):
            return f"{self.parent}{name}"
        if define:
            self.parent = name
        return name

    def _new(self, name: str) -> None:
        if name in self.labels or name in self.constants:
            raise Malformed(f"{name} is defined twice")
        if name.lower() in _RESERVED or name.lower() in REGISTERS:
            raise Malformed(f"{name} cannot be a name")

    def _define(self, name: str) -> None:
        self._new(name)
        self.labels[name] = (self.current, self.current.place)
        if self.first_label is None and self.current.kind is SectionKind.TEXT:
            self.first_label = name

    def _equ(self, name: str, text: str) -> None:
        self._new(name)
        self.constants[name] = self._expression(text)

    def _name(self, name: str) -> Linear:
        if name == "$":
            self.here += 1
            anonymous = f"$@{self.here}"
            self.labels[anonymous] = (self.current, self.current.place)
            return Linear(0, {anonymous: 1})
        if name.startswith("$") or "@" in name:
            raise Malformed(f"{name!r} is not a name")
        if name.lower() in _RESERVED:
            raise Malformed(f"{name} cannot stand here")
        if name.lower() in REGISTERS:
            raise Malformed(f"register {name} cannot stand in an expression")
        name = self._qualified(name)
        return self.constants.get(name, Linear(0, {name: 1}))

    def _expression(self, text: str) -> Linear:
        return self._fold(parse_expression(text, self._name))

    def _fold(self, value: Linear) -> Linear:
        """Replace constants, and a difference of labels whose places are known already."""
        for _ in range(_MAX_CHAIN):
            known = [name for name in value.terms if name in self.constants]
            if not known:
                break
            for name in known:
                factor = value.terms[name]
                value = value.plus(Linear(0, {name: 1}), -factor).plus(self.constants[name], factor)
        else:
            raise Malformed("constants are defined by each other")
        pair = value.difference()
        if pair is None or pair[0] not in self.labels or pair[1] not in self.labels:
            return value
        (first, high), (second, low) = self.labels[pair[0]], self.labels[pair[1]]
        if first is not second or first.kind is SectionKind.TEXT:
            return value
        return Linear(value.constant + high - low)

    def _count(self, text: str) -> int:
        value = self._expression(text)
        if not value.is_constant:
            raise Malformed(f"{text.strip()[:60]!r} is not known here")
        if not 0 <= value.constant <= MAX_SECTION_SIZE:
            raise Malformed(f"{value.constant} is not within 0 to {MAX_SECTION_SIZE}")
        return value.constant

    # Data.

    def _put(self, number: int, item: Encoded) -> None:
        if self.current.kind is SectionKind.BSS:
            raise Malformed(".bss holds no data: use resb, resw, resd or resq")
        self._advance(len(item.data))
        self.current.items.append((number, item))

    def _advance(self, size: int) -> None:
        limit = MAX_SECTION_SIZE if self.current.kind is SectionKind.BSS else MAX_DATA_SIZE
        if self.current.offset + size > limit:
            raise Malformed(f"section {self.current.name} exceeds {limit >> 20} MiB")
        self.current.offset += size

    def _reserve(self, number: int, size: int) -> None:
        if self.current.kind is SectionKind.TEXT:
            raise Malformed("nothing can be reserved in .text")
        self._advance(size)
        if self.current.kind is not SectionKind.BSS:
            self.current.items.append((number, size))

    def _align(self, number: int, align: int) -> None:
        if not 1 <= align <= MAX_ALIGN or align & (align - 1):
            raise Malformed(f"alignment {align} is not a power of two up to {MAX_ALIGN}")
        self.current.align = max(self.current.align, align)
        if self.current.kind is SectionKind.TEXT:
            self.current.items.append((number, Align(align)))
        else:
            self._reserve(number, align_up(self.current.offset, align) - self.current.offset)

    def _times(self, number: int, text: str) -> None:
        match = re.search(r"\s(db|dw|dd|dq)\s", text, re.ASCII | re.IGNORECASE)
        if not match:
            raise Malformed("times expects COUNT and db, dw, dd or dq")
        count = self._count(text[: match.start()])
        one = self._data(_DATA[match[1].lower()], text[match.end() :])
        if count * len(one.data) > MAX_DATA_SIZE or count * len(one.fixups) > MAX_LINES:
            raise Malformed(f"times {count} is too much")
        size = len(one.data)
        fixups = tuple(replace(f, offset=f.offset + size * n) for n in range(count) for f in one.fixups)
        self._put(number, Encoded(one.data * count, fixups))

    def _data(self, size: int, text: str) -> Encoded:
        data = bytearray()
        fixups: list[Fixup] = []
        for piece in _split(text):
            piece = piece.strip()
            string = re.fullmatch(r"\"((?:[^\"\\]|\\.)*)\"|'((?:[^'\\]|\\.)*)'", piece)
            if string and size == 1:
                data += unescape(string[1] if string[1] is not None else string[2])
                continue
            value = self._expression(piece)
            if not value.is_constant:
                if size not in (4, 8) or (value.single() is None and value.difference() is None):
                    raise Malformed(f"{piece[:60]!r}: an address needs dq (or dd below 4 GiB)")
                fixups.append(Fixup(len(data), RelocationType.R64 if size == 8 else RelocationType.R32, size, value))
                data += bytes(size)
                continue
            if not -(1 << 8 * size - 1) <= value.constant < 1 << 8 * size:
                raise Malformed(f"{value.constant:#x} does not fit {size} byte{'s' if size > 1 else ''}")
            data += (value.constant & (1 << 8 * size) - 1).to_bytes(size, "little")
        return Encoded(bytes(data), tuple(fixups))

    # Instructions.

    def _instruction(self, number: int, word: str, rest: str) -> None:
        if self.current.kind is not SectionKind.TEXT:
            raise Malformed(f"unknown directive or instruction outside .text: {word}")
        prefix = ""
        if word in PREFIXES:
            match = _WORD.match(rest)
            if not match:
                raise Malformed(f"{word} stands before an instruction")
            prefix, word, rest = word, match[1].lower(), rest[match.end() :].strip()
        distance = re.match(r"(short|near)\s+", rest, re.IGNORECASE) if is_branch(word) else None
        if distance:
            rest = rest[distance.end() :]
        operands: list[Operand] = [parse_operand(p, self._name) for p in _split(rest)] if rest else []
        operands = [self._folded(o) for o in operands]
        if is_branch(word) and len(operands) == 1:
            only = operands[0]
            if isinstance(only, Imm):
                branch = encode_branch(word, distance is not None and distance[1].lower() == "short", only.value)
                if branch is not None and not prefix:
                    self.current.items.append((number, branch))
                    return
            elif isinstance(only, Mem) and only.size is None:
                operands = [replace(only, size=8)]
        self.current.items.append((number, Instruction(number, prefix, word, tuple(operands))))

    def _folded(self, operand: Operand) -> Operand:
        if isinstance(operand, Imm):
            return Imm(self._fold(operand.value))
        if isinstance(operand, Mem):
            return replace(operand, displacement=self._fold(operand.displacement))
        return operand

    # The end.

    def _settled(self, line: int, item: Item) -> Item:
        """The item with constants and labels that were defined below it."""
        try:
            if isinstance(item, Instruction) and item.operands:
                return replace(item, operands=tuple(self._folded(o) for o in item.operands))
            if isinstance(item, Encoded) and item.fixups:
                return replace(item, fixups=tuple(replace(f, value=self._fold(f.value)) for f in item.fixups))
        except Malformed as problem:
            raise BadInstruction(line, str(problem)) from None
        return item

    def finish(self) -> Program:
        for name, line in self.globals.items():
            if name not in self.labels:
                raise GuestError(self.path, line, f"global {name} is not defined")
        for name, line in self.externs.items():
            if name in self.labels or name in self.constants:
                raise GuestError(self.path, line, f"extern {name} is defined here")
        for section in self.sections:
            section.items = [(line, self._settled(line, item)) for line, item in section.items]
        text = self.sections[0]
        waiting = [item for _, item in text.items if isinstance(item, Instruction)]
        encoded = iter(encode(waiting))
        text.items = [(n, next(encoded) if isinstance(item, Instruction) else item) for n, item in text.items]
        return Layout(self.path, self.sections, self.labels, self.first_label).program()
