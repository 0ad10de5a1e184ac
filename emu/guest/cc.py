"""Compile .c and .S guests with gcc into an object in a temporary directory, and read that."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from emu.guest.directives import parse_directives
from emu.guest.elf import read_object
from emu.guest.error import GuestError
from emu.guest.program import Program

# Code as the kernel's Makefile asks for it (v6.12 arch/x86/Makefile), without the mitigations that need a runtime.
FLAGS = (
    "-c -O1 -std=gnu11 -ffreestanding -fno-pic -fno-pie -mcmodel=kernel -mno-red-zone -mgeneral-regs-only "
    "-fno-stack-protector -fno-asynchronous-unwind-tables -fno-unwind-tables -fcf-protection=none -fno-common "
    "-fno-strict-aliasing -fno-tree-vectorize -nostdinc -Wall -Werror -fno-diagnostics-show-caret -fdiagnostics-color=never "
    "-ftrack-macro-expansion=0"
).split()
TIMEOUT_SECONDS = 30


def include_directory() -> Path:
    """The folder of the guests' kernel headers: beside the package when installed, guest/include in a checkout.

    Raises FileNotFoundError when the installation lacks it.
    """
    here = Path(__file__).resolve().parent
    for candidate in (here / "include", here.parent.parent / "guest" / "include"):
        if (candidate / "linux").is_dir():
            return candidate
    raise FileNotFoundError("the guests' headers (guest/include/linux) are not installed")


def compiler() -> str | None:
    """Path of gcc, None when there is none."""
    return shutil.which("gcc")


def compile_source(source: Path, text: str) -> Program:
    """The program in a .c or .S file whose text was read as `text`.

    Raises GuestError: a bad directive, gcc's first error with its line, no gcc, or gcc not done in TIMEOUT_SECONDS.
    """
    path = str(source)
    directives = parse_directives(text, path, "c")
    gcc = compiler()
    if gcc is None:
        raise GuestError(path, 0, f"no gcc found, which {source.suffix} guests need (.asm and .o guests do not)")
    try:
        include = include_directory()
    except FileNotFoundError as missing:
        raise GuestError(path, 0, str(missing)) from None
    with tempfile.TemporaryDirectory(prefix="vmemu-") as folder:
        target = Path(folder) / "guest.o"
        language = "assembler-with-cpp" if source.suffix == ".S" else "c"
        command = [gcc, *FLAGS, f"-I{include}", f"-I{source.resolve().parent}", "-x", language, "-", "-o", str(target)]
        marked = f'# 1 "{_quoted(path)}"\n{text}' if language == "c" else f'#line 1 "{_quoted(path)}"\n{text}'
        errors = _run(command, marked.encode("utf-8", "surrogateescape"), folder, path)
        if errors is not None:
            raise _first_error(path, errors)
        return replace(read_object(target.read_bytes(), path), directives=directives)


def _run(command: list[str], source: bytes, folder: str, path: str) -> str | None:
    """What gcc said when it failed, None when it did not. gcc is a driver: its group is ended, not only itself."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TMPDIR": folder}
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder, env=environment,
            start_new_session=True,
        )  # fmt: skip
    except OSError as problem:
        raise GuestError(path, 0, f"gcc cannot be run: {problem.strerror}") from None
    try:
        _, errors = process.communicate(source, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise GuestError(path, 0, f"gcc was not done after {TIMEOUT_SECONDS} s") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return errors.decode("utf-8", "replace") if process.returncode else None


def _quoted(path: str) -> str:
    return path.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "?")


def _first_error(path: str, output: str) -> GuestError:
    for line in output.splitlines():
        match = re.match(r"(.*?):(\d+):(?:\d+:)? (?:fatal error|error|Error): (.*)", line)
        if match:
            where = "" if match[1] == path else f"{match[1]}:{match[2]}: "
            return GuestError(path, int(match[2]) if not where else 0, where + match[3])
    first = next((line for line in output.splitlines() if line.strip()), "no message")
    return GuestError(path, 0, f"gcc failed: {first.strip()}")
