import pytest
from capstone import CS_ARCH_X86, CS_MODE_64, Cs
from hypothesis import given, settings
from hypothesis import strategies as st
from unicorn import UC_ARCH_X86, UC_MODE_64, Uc, UcError
from unicorn.x86_const import UC_X86_REG_RAX, UC_X86_REG_RDI, UC_X86_REG_RDX, UC_X86_REG_RIP, UC_X86_REG_RSI, UC_X86_REG_RSP

from emu.kernel.string_ops import STRING_OPS, THUNKS, machine_code

CODE = 0x10000
DATA = 0x20000
STACK = 0x30000
STOP = 0x40000


class Runner:
    def __init__(self):
        self.uc = Uc(UC_ARCH_X86, UC_MODE_64)
        for base in (CODE, DATA, STACK, STOP):
            self.uc.mem_map(base, 0x1000)
        self.starts = {}
        at = CODE
        for name, instructions in STRING_OPS.items():
            code = machine_code(instructions)
            self.uc.mem_write(at, code)
            self.starts[name] = at
            at += len(code) + 15 & -16

    def call(self, name, *arguments):
        self.uc.reg_write(UC_X86_REG_RSP, STACK + 0x800)
        self.uc.mem_write(STACK + 0x800, STOP.to_bytes(8, "little"))
        self.uc.reg_write(UC_X86_REG_RAX, 0xDEAD)
        for register, value in zip((UC_X86_REG_RDI, UC_X86_REG_RSI, UC_X86_REG_RDX), arguments, strict=False):
            self.uc.reg_write(register, value)
        self.uc.emu_start(self.starts[name], STOP)
        return self.uc.reg_read(UC_X86_REG_RAX)

    def put(self, offset, data):
        self.uc.mem_write(DATA + offset, data)

    def get(self, offset, size):
        return bytes(self.uc.mem_read(DATA + offset, size))


@pytest.fixture(scope="module")
def cpu():
    return Runner()


def signed(value):
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


@pytest.mark.parametrize("name", [*STRING_OPS, *THUNKS])
def test_every_listing_is_what_its_bytes_disassemble_to(name):
    listing = {**STRING_OPS, **THUNKS}[name]
    decoded = Cs(CS_ARCH_X86, CS_MODE_64).disasm(machine_code(listing), 0)
    assert [(i.bytes.hex(" "), f"{i.mnemonic} {i.op_str}".strip()) for i in decoded] == list(listing)


@given(st.integers(0, 40), st.integers(0, 300), st.integers(0, 0xFFFF))
@settings(max_examples=80, deadline=None)
def test_memset_fills_exactly_its_bytes_with_the_low_byte(cpu, start, size, value):
    cpu.put(0, b"\x11" * 512)
    assert cpu.call("memset", DATA + start, value, size) == DATA + start
    assert cpu.get(0, 512) == b"\x11" * start + bytes([value & 0xFF]) * size + b"\x11" * (512 - start - size)


@given(st.binary(max_size=300), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_memcpy_copies_and_returns_the_destination(cpu, data, offset):
    cpu.put(0, bytes(2048))
    cpu.put(1024, data)
    assert cpu.call("memcpy", DATA + offset, DATA + 1024, len(data)) == DATA + offset
    assert cpu.get(0, 400) == bytes(offset) + data + bytes(400 - offset - len(data))


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 200))
@settings(max_examples=150, deadline=None)
def test_memmove_is_right_for_every_overlap(cpu, to, source, size):
    before = bytes(i * 7 & 0xFF for i in range(400))
    cpu.put(0, before)
    assert cpu.call("memmove", DATA + to, DATA + source, size) == DATA + to
    expected = bytearray(before)
    expected[to : to + size] = before[source : source + size]
    assert cpu.get(0, 400) == bytes(expected)


TEXT = st.binary(max_size=12).map(lambda b: b.replace(b"\0", b"\x80"))


@given(TEXT, TEXT, st.integers(0, 14))
@settings(max_examples=150, deadline=None)
def test_comparisons_have_the_sign_of_the_first_differing_unsigned_byte(cpu, one, two, size):
    cpu.put(0, one + bytes(32))
    cpu.put(100, two + bytes(32))

    def sign(a, b):
        return (a > b) - (a < b)

    def got(name, *more):
        value = signed(cpu.call(name, DATA, DATA + 100, *more))
        return (value > 0) - (value < 0)

    assert got("strcmp") == sign(one, two)
    assert got("strncmp", size) == sign(one[:size], two[:size])
    assert got("memcmp", size) == sign((one + bytes(32))[:size], (two + bytes(32))[:size])


@given(TEXT, st.integers(0, 14), st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_lengths_and_searches(cpu, text, limit, byte):
    cpu.put(0, text + b"\0" + b"\x55" * 30)
    whole = text + b"\0"
    assert cpu.call("strlen", DATA) == len(text)
    assert cpu.call("strnlen", DATA, limit) == min(len(text), limit)
    first, last = whole.find(bytes([byte])), whole.rfind(bytes([byte]))
    assert cpu.call("strchr", DATA, byte) == (DATA + first if first >= 0 else 0)
    assert cpu.call("strrchr", DATA, byte) == (DATA + last if last >= 0 else 0)
    found = (whole + b"\x55" * 30)[:limit].find(bytes([byte]))
    assert cpu.call("memchr", DATA, byte, limit) == (DATA + found if found >= 0 else 0)


@given(TEXT, TEXT, st.integers(0, 20))
@settings(max_examples=80, deadline=None)
def test_string_copies(cpu, one, two, size):
    cpu.put(0, b"\x55" * 64)
    cpu.put(100, two + b"\0")
    assert cpu.call("strcpy", DATA, DATA + 100) == DATA
    assert cpu.get(0, 64) == (two + b"\0").ljust(64, b"\x55")
    cpu.put(0, b"\x55" * 64)
    assert cpu.call("strncpy", DATA, DATA + 100, size) == DATA
    assert cpu.get(0, 64) == two[:size].ljust(size, b"\0").ljust(64, b"\x55")
    cpu.put(0, one + b"\0" + b"\x55" * 63)
    assert cpu.call("strcat", DATA, DATA + 100) == DATA
    assert cpu.get(0, 64) == (one + two + b"\0").ljust(64, b"\x55")


def test_a_page_is_cleared_and_copied_whole():
    cpu = Runner()
    cpu.uc.mem_map(0x50000, 0x2000)
    cpu.uc.mem_write(0x50000, b"\x77" * 4096)
    cpu.call("copy_page", 0x51000, 0x50000)
    assert bytes(cpu.uc.mem_read(0x51000, 4096)) == b"\x77" * 4096
    cpu.call("clear_page", 0x50000)
    assert bytes(cpu.uc.mem_read(0x50000, 4096)) == bytes(4096)


def test_a_bad_pointer_faults_inside_the_function():
    cpu = Runner()
    with pytest.raises(UcError):
        cpu.call("memset", DATA + 0xFF8, 0xAA, 64)
    inside = cpu.uc.reg_read(UC_X86_REG_RIP) - cpu.starts["memset"]
    assert inside == sum(len(bytes.fromhex(code)) for code, _ in STRING_OPS["memset"][:7])
    assert cpu.get(0xFF8, 8) == b"\xaa" * 8
