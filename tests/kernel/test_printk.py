import ctypes

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from emu.kernel.gfp import GFP_DMA32, GFP_KERNEL, Gfp, gfp_text
from emu.kernel.printk import KERN_SOH, KernelLog, LogLevel
from emu.kernel.vsprintf import Formatter

MEMORY = {
    0x10000: b"hello\0" + bytes(range(16)),
    0x10100: (GFP_KERNEL | Gfp.ZERO).to_bytes(4, "little"),
    0x10200: (0xFED00000).to_bytes(8, "little"),
    0x10FFE: b"ab",
}
PAGE = bytearray(4096)
for where, data in MEMORY.items():
    PAGE[where - 0x10000 : where - 0x10000 + len(data)] = data

SYMBOLS = {0xFFFFFFFF81001005: "vmalloc+0x5/0x10", 0xFFFFFFFFC0000040: "init_module+0x40/0x80 [guard_page]"}
SYMBOLS[0xFFFFFFFF8100100F] = "vmalloc+0xf/0x10"


def read_bytes(la, size):
    return bytes(PAGE[la - 0x10000 : la - 0x10000 + size]) if la >= 0x10000 and la + size <= 0x11000 else None


def formatter(**options):
    return Formatter(read_bytes, SYMBOLS.get, hash_key=b"seed", **options)


def text(fmt, *arguments, **options):
    values = iter(arguments)
    return formatter(**options).format(fmt, lambda: next(values) & (1 << 64) - 1)


@pytest.mark.parametrize(
    ("fmt", "arguments", "expected"),
    [
        ("plain %% text", (), "plain % text"),
        ("%d|%i|%u", (-1, 7, -1), "-1|7|4294967295"),
        ("%x %X %#x %#X %o %#o %#o", (255, 255, 255, 255, 8, 8, 0), "ff FF 0xff 0XFF 10 010 0"),
        ("%hhd %hd %hhx", (0x1FF, 0x18000, -1), "-1 -32768 ff"),
        ("%ld %lu %llx %Lx %zu %zd %td", (-1, -1, -1, 10, 5, -5, -2), "-1 18446744073709551615 " + "f" * 16 + " a 5 -5 -2"),
        ("[%5d|%-5d|%05d|%+d|% d|%5.3d]", (42, 42, -42, 42, 42, 7), "[   42|42   |-0042|+42| 42|  007]"),
        ("%#010x|%-#8x|%#8x", (0xAB, 0xAB, 0xAB), "0x000000ab|0xab    |    0xab"),
        ("%*d|%-*d|%*d|%.*d", (4, 7, 4, 7, -4, 7, 3, 7), "   7|7   |7   |007"),
        ("%c%3c%-3c|", (65, 66, 67), "A  BC  |"),
        ("%s|%8s|%-8s|%.3s|%.*s", (0x10000,) * 4 + (2, 0x10000), "hello|   hello|hello   |hel|he"),
        ("%s %s %s %s", (0, 8, -14, 0x999999), "(null) (efault) (efault) (efault)"),
        ("%.2s", (0x10FFE,), "ab"),
        ("%s", (0x10FFE,), "(efault)"),
        ("%px %px %20px", (0xFFFFC90000000000, 0, 0xABC), "ffffc90000000000 0000000000000000 " + " " * 17 + "abc"),
        ("%p %p", (0, -12), "0000000000000000 fffffffffffffff4"),
        ("%pe %pe", (-12, -1000), "-ENOMEM -1000"),
        ("%pe %pe", (-95, -517), "-EOPNOTSUPP -EPROBE_DEFER"),
        ("%pS|%ps|%pB", (0xFFFFFFFF81001005, 0xFFFFFFFF81001005, 0xFFFFFFFF81001010), "vmalloc+0x5/0x10|vmalloc|vmalloc+0x10/0x10"),
        ("%pS|%ps", (0xFFFFFFFFC0000040,) * 2, "init_module+0x40/0x80 [guard_page]|init_module [guard_page]"),
        ("%pS %pB", (0x1234, 0x1234), "0x1234 0x1234"),
        ("%6ph|%6phN", (0x10000,) * 2, "68 65 6c 6c 6f 00|68656c6c6f00"),
        ("%3phC|%3phD|%*ph", (0x10000, 0x10000, 2, 0x10000), "68:65:6c|68-65-6c|68 65"),
        ("%ph %3ph", (0x10000, 0), "68 (null)"),
        ("%pGg|%pGg", (0x10100, 0), "GFP_KERNEL|__GFP_ZERO|(null)"),
        ("%pa %pad", (0x10200, 0x10200), "0x00000000fed00000 0x00000000fed00000"),
        ("%pKx|", (0,), "0000000000000000|"),
    ],
)
def test_the_kernels_formats(fmt, arguments, expected):
    assert text(fmt, *arguments) == expected


def test_p_prints_the_same_32_bit_hash_for_the_same_pointer_and_key():
    first = text("%p", 0xFFFFC90000000000)
    assert first == text("%p", 0xFFFFC90000000000) == text("%pK", 0xFFFFC90000000000)
    assert first[:8] == "00000000"
    assert int(first, 16) != 0xFFFFC90000000000
    assert first != text("%p", 0xFFFFC90000001000)
    assert text("%p", 0xFFFFC90000000000, no_hash_pointers=True) == "ffffc90000000000"
    assert text("%pK", 0xFFFFC90000000000, kptr_restrict=2) == "0" * 16


@pytest.mark.parametrize(("fmt", "letter"), [("a%nb", "n"), ("a%fb", "f"), ("a%", "\0"), ("a%5", "\0")])
def test_an_unsupported_conversion_warns_and_ends_the_text(fmt, letter):
    warnings = []
    assert text(fmt, 1, warn=warnings.append) == "a"
    assert warnings == [f"Please remove unsupported %{letter} in format string"]


def test_a_fault_that_the_reader_raises_is_not_swallowed():
    def read(la, size):
        raise KeyError(la)

    with pytest.raises(KeyError):
        Formatter(read).format("%s", lambda: 0x5000)


@pytest.mark.parametrize("fmt", ["%s", "%4ph", "%pa", "%pGg"])
def test_a_null_small_or_error_pointer_is_never_read(fmt):
    read = []
    printer = Formatter(lambda la, size: bool(read.append(la)) or None)
    assert [printer.format(fmt, lambda la=la: la) for la in (0, 8, 4095, (1 << 64) - 14)] == ["(null)"] + ["(efault)"] * 3
    assert read == []


def test_vsnprintf_cuts_to_the_buffer_and_returns_the_whole_length():
    values = iter([123456])
    assert formatter().vsnprintf(4, "%d", lambda: next(values)) == ("123", 6)


@given(
    st.sampled_from(["d", "i", "u", "x", "X", "o"]),
    st.sampled_from(["", "l", "ll", "h", "hh"]),
    st.sets(st.sampled_from("-+ #0")),
    st.none() | st.integers(0, 20),
    st.none() | st.integers(1, 20),
    st.integers(-(1 << 63), (1 << 63) - 1),
)
@settings(max_examples=400, deadline=None)
def test_integers_print_as_in_the_c_library_where_both_define_it(kind, qualifier, flags, width, precision, value):
    # The kernel prefixes 0 with 0x, fills with zeros despite a precision, and adds # to it: there the two differ.
    assume(not ("#" in flags and (kind == "o" or value == 0)) and not ("0" in flags and precision is not None))
    digits = ("" if width is None else str(width)) + ("" if precision is None else f".{precision}")
    fmt = f"%{''.join(sorted(flags))}{digits}{qualifier}{kind}"
    bits = {"": 32, "h": 16, "hh": 8}.get(qualifier, 64)
    assume(value & (1 << bits) - 1)
    buffer = ctypes.create_string_buffer(200)
    ctypes.CDLL(None).snprintf(buffer, 200, fmt.encode(), ctypes.c_uint64(value & (1 << 64) - 1))
    assert text(fmt, value) == buffer.value.decode()


@given(st.text(st.characters(max_codepoint=127), max_size=30), st.lists(st.integers(0, (1 << 64) - 1), min_size=40, max_size=40))
@settings(max_examples=300, deadline=None)
def test_no_format_string_makes_it_raise(fmt, arguments):
    text(fmt.replace("1", "%"), *(value if value < 1 << 40 else value % 97 for value in arguments))


def test_gfp_texts_take_the_widest_names_first():
    assert gfp_text(int(GFP_KERNEL)) == "GFP_KERNEL"
    assert gfp_text(0x2DC2) == "GFP_KERNEL|__GFP_HIGHMEM|__GFP_NOWARN|__GFP_ZERO"
    assert gfp_text(int(GFP_DMA32)) == "GFP_DMA32"
    assert gfp_text(0x400) == "__GFP_DIRECT_RECLAIM"
    assert gfp_text(0x80000000) == "0x80000000"
    assert gfp_text(0) == ""


def test_a_line_keeps_its_level_and_a_newline_ends_it():
    log = KernelLog(now=lambda: 1_234_567_890)
    log.printk(KERN_SOH + "3out of memory\n")
    log.printk("no level\n")
    assert [(line.level, line.text) for line in log.lines] == [(LogLevel.ERR, "out of memory"), (LogLevel.WARNING, "no level")]
    assert log.text(timestamps=True).splitlines()[0] == "[    1.234567] out of memory"


def test_kern_cont_continues_an_open_line_only():
    log = KernelLog()
    log.printk("one")
    log.printk(KERN_SOH + "c two\n")
    log.printk(KERN_SOH + "cthree\n")
    assert log.text() == "one two\nthree\n"


def test_an_embedded_newline_makes_two_lines_and_long_records_are_cut():
    lines = []
    log = KernelLog(on_line=lines.append)
    assert log.printk("a\nb\n") == 4
    log.printk("x" * 5000)
    assert [len(line.text) for line in lines] == [1, 1, 1024]


def test_lines_of_the_kernels_own_are_stored_one_by_one():
    log = KernelLog()
    log.printk("open")
    log.print_lines(("BUG: unable to handle page fault", "#PF: supervisor write access"), LogLevel.ALERT)
    assert log.text() == "open\nBUG: unable to handle page fault\n#PF: supervisor write access\n"
    assert log.lines[-1].level == LogLevel.ALERT
