"""C and .S guests: gcc's errors come out as ours, nothing stays behind, and its absence is said."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from emu.guest import cc
from emu.guest.error import GuestError
from emu.guest.load import load

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refused(path: Path) -> GuestError:
    with pytest.raises(GuestError) as error:
        load(path)
    return error.value


@needs_gcc
def test_a_c_guest_with_our_headers_becomes_a_program(tmp_path: Path) -> None:
    source = written(
        tmp_path,
        "t.c",
        "// expect: return 3\n#include <linux/module.h>\n#include <linux/vmalloc.h>\n"
        "static int __init go(void) { return vmalloc(1) ? 3 : -ENOMEM; }\nmodule_init(go);\nMODULE_LICENSE(\"GPL\");\n",
    )
    program = load(source)
    program.validate()
    assert program.undefined() == ("vmalloc",)
    assert program.entry_symbol.name == "init_module"
    assert len(program.directives.expectations) == 1


@needs_gcc
def test_the_first_error_of_gcc_names_the_line_of_the_source(tmp_path: Path) -> None:
    error = refused(written(tmp_path, "t.c", "int x;\nint init_module(void) { return y; }\n"))
    assert error.line == 2
    assert "undeclared" in error.message
    error = refused(written(tmp_path, "t.S", "\t.text\ninit_module:\n\tfrobnicate %rax\n"))
    assert error.line == 3
    assert "frobnicate" in error.message


@needs_gcc
def test_a_warning_is_an_error(tmp_path: Path) -> None:
    error = refused(written(tmp_path, "t.c", "int init_module(void) { int unused; return 0; }\n"))
    assert error.line == 1
    assert "unused" in error.message


@needs_gcc
def test_a_wrong_printk_format_is_an_error(tmp_path: Path) -> None:
    text = '#include <linux/module.h>\nint init_module(void) { pr_info("%d\\n", "text"); return 0; }\n'
    assert refused(written(tmp_path, "t.c", text)).line == 2


@needs_gcc
def test_system_headers_are_not_found(tmp_path: Path) -> None:
    assert "stdio.h" in refused(written(tmp_path, "t.c", "#include <stdio.h>\n")).message


@needs_gcc
def test_every_header_compiles_alone(tmp_path: Path) -> None:
    for header in sorted((cc.include_directory() / "linux").glob("*.h")):
        text = f"#include <linux/{header.name}>\nint init_module(void) {{ return 0; }}\n"
        load(written(tmp_path, "t.c", text)).validate()


@needs_gcc
def test_nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    load(written(tmp_path, "good.c", "int init_module(void) { return 0; }\n"))
    refused(written(tmp_path, "bad.c", "int init_module(void) { return }\n"))
    assert list(scratch.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.c", "good.c", "scratch"]


def test_without_gcc_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "no gcc found" in refused(written(tmp_path, "t.c", "int init_module(void) { return 0; }\n")).message


def test_a_compiler_that_does_not_end_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = written(tmp_path, "gcc", f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/child\nwait\n")
    fake.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(fake))
    monkeypatch.setattr(cc, "TIMEOUT_SECONDS", 0.3)
    assert "not done after 0.3 s" in refused(written(tmp_path, "t.c", "int init_module(void) { return 0; }\n")).message
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split(")")[1].split()[0] == "Z"


def test_a_wrong_directive_is_found_before_gcc_runs(tmp_path: Path) -> None:
    assert refused(written(tmp_path, "t.c", "/*\n * vmemu: level=4\n */\nnot C at all\n")).line == 2


def test_files_that_are_no_guests_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "absent.asm").message
    assert "is not a guest" in refused(written(tmp_path, "t.txt", "")).message
    assert "not a regular file" in refused(tmp_path.joinpath("d.asm").mkdir() or tmp_path / "d.asm").message
    (tmp_path / "t.asm").write_bytes(b"ret\n\xff\xfe")
    assert str(refused(tmp_path / "t.asm")).endswith("t.asm:2: not UTF-8 text")
    assert "not an ELF file" in refused(written(tmp_path, "t.o", "x")).message
