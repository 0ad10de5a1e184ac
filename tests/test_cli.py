"""The command line: exit statuses, one line for bad input, the same bytes for the same seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUEST = ROOT / "guest"


def vmemu(*arguments: str, cwd: Path = ROOT, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "random"}
    return subprocess.run(
        [sys.executable, "-m", "emu", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout,
        check=False,
    )


def refused(*arguments: str, cwd: Path = ROOT) -> str:
    """The one line with which the command refuses; the status is 2, and nothing is on stdout."""
    run = vmemu(*arguments, cwd=cwd)
    assert run.returncode == 2, run.stdout + run.stderr
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1, run.stderr
    assert "Traceback" not in run.stderr
    return run.stderr


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """An empty folder for guests."""
    return tmp_path


def write(folder: Path, name: str, text: str | bytes) -> str:
    """A file in the folder; returns its path."""
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_a_guest_that_ends_as_expected_is_status_0() -> None:
    run = vmemu("run", str(GUEST / "guard_page.asm"))
    assert run.returncode == 0
    assert "BUG: unable to handle page fault for address: ffffc90000006000" in run.stdout
    assert run.stderr == ""


def test_a_failed_expectation_is_status_1_and_names_its_line(guest: Path) -> None:
    path = write(guest, "wrong.asm", "; expect: return 1\nsection .text\ninit_module:\n    xor eax, eax\n    ret\n")
    run = vmemu("run", path)
    assert run.returncode == 1
    assert "line 1: expected return 1, but it returned 0" in run.stdout


def test_an_unexpected_oops_is_status_1(guest: Path) -> None:
    path = write(guest, "crash.asm", "section .text\ninit_module:\n    ud2\n")
    run = vmemu("run", path)
    assert run.returncode == 1
    assert "invalid opcode" in run.stdout


def test_an_endless_loop_is_stopped_and_is_status_1(guest: Path) -> None:
    path = write(guest, "loop.asm", "section .text\ninit_module:\n    jmp init_module\n")
    run = vmemu("run", "--max-instructions", "20000", path)
    assert run.returncode == 1
    assert "reached its limit of 20000 instructions" in run.stdout


def test_a_triple_fault_is_reported_with_its_chain() -> None:
    run = vmemu("run", str(GUEST / "triple_fault.asm"))
    assert run.returncode == 0
    assert "triple fault" in run.stdout


def test_a_guest_that_halts_for_ever_is_status_1(guest: Path) -> None:
    path = write(guest, "halt.asm", "section .text\ninit_module:\n    cli\n    hlt\n")
    run = vmemu("run", path)
    assert run.returncode == 1
    assert "halted" in run.stdout


def test_page_tables_that_point_outside_ram_stop_the_machine_with_a_bus_error(guest: Path) -> None:
    text = """section .text
init_module:
    mov rax, 0x7fffff000
    mov cr3, rax
    mov rax, [rsp - 0x100000]           ; no TLB entry helps here
    ret
"""
    run = vmemu("run", write(guest, "cr3.asm", text))
    assert run.returncode == 1
    assert "no RAM at physical address" in run.stdout


def test_a_missing_file_is_refused(guest: Path) -> None:
    assert "no_such.asm" in refused("run", str(guest / "no_such.asm"))


def test_a_folder_is_refused(guest: Path) -> None:
    assert str(guest) in refused("run", str(guest))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("syntax.asm", "section .text\ninit_module:\n    mov rax\n", "syntax.asm:3"),
        ("unknown.asm", "section .text\ninit_module:\n    frobnicate rax\n    ret\n", "unknown.asm:3"),
        ("symbol.asm", "section .text\ninit_module:\n    call no_such_function\n    ret\n", "no_such_function"),
        ("directive.asm", "; vmemu: colour=red\nsection .text\ninit_module:\n    ret\n", "directive.asm:1"),
        ("expect.asm", "; expect: happiness\nsection .text\ninit_module:\n    ret\n", "expect.asm:1"),
        ("entry.asm", "section .data\nfoo: dq 1\n", "entry"),
        ("empty.asm", "", "empty.asm"),
        ("bytes.asm", b"\xff\xfe\x00", "not UTF-8"),
        ("truncated.o", b"\x7fELF\x02\x01\x01", "truncated.o"),
        ("text.o", b"hello", "text.o"),
        ("picture.png", b"\x89PNG", ".png"),
    ],
)
def test_a_bad_guest_is_refused_in_one_line_that_names_the_place(guest: Path, name: str, text: str | bytes, says: str) -> None:
    assert says in refused("run", write(guest, name, text))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--levels", "3"], "--levels"),
        (["--levels", "x"], "--levels"),
        (["--cpus", "65"], "--cpus"),
        (["--memory", "banana"], "banana"),
        (["--memory", "0"], "--memory"),
        (["--memory", "3M"], "multiple of 4 MiB"),
        (["--memory", "4M"], "memory size"),
        (["--memory", "2T"], "1 TiB"),
        (["--memory", "99999999999999999999T"], "out of range"),
        (["--nodes", "0"], "--nodes"),
        (["--nodes", "9"], "--nodes"),
        (["--kernel", "2.4"], "--kernel"),
        (["--tlb", "huge"], "--tlb"),
        (["--seed", "-1"], "--seed"),
        (["--kaslr", "maybe"], "maybe"),
        (["--max-instructions", "0"], "--max-instructions"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_an_absurd_option_is_refused_in_one_line_that_names_it(options: list[str], says: str) -> None:
    guest = str(GUEST / "hello.asm")
    assert says in refused("run", guest, *options)


def test_no_command_is_refused() -> None:
    assert "COMMAND" in refused()


def test_every_file_is_run_though_one_is_bad(guest: Path) -> None:
    run = vmemu("run", str(GUEST / "hello.asm"), str(guest / "absent.asm"), str(GUEST / "ud2.asm"))
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert run.stdout.endswith("2 passed, 0 failed, 1 could not be run\n")


def test_ram_too_small_to_boot_names_the_size(guest: Path) -> None:
    assert "memory size is 0x1000000" in refused("run", str(GUEST / "hello.asm"), "--memory", "16M")


def test_json_is_one_array_with_what_the_text_says() -> None:
    run = vmemu("run", "--json", str(GUEST / "guard_page.asm"))
    assert run.returncode == 0
    (result,) = json.loads(run.stdout)
    assert result["ok"] is True
    assert result["ended"] == "oops"
    assert result["faults"][0]["name"] == "#PF"
    assert result["faults"][0]["error"] == 0
    assert "guard page" in result["faults"][0]["place"]
    assert result["machine"]["levels"] == 4


def test_two_processes_with_the_same_seed_print_the_same_bytes() -> None:
    guests = [str(GUEST / f"{name}.asm") for name in ("guard_page", "stack_overflow", "demand_fault")]
    arguments = ("run", "--json", "--kaslr", "--seed", "7", *guests)
    one, two = vmemu(*arguments), vmemu(*arguments)
    assert one.stdout == two.stdout
    assert json.loads(one.stdout)


def test_kaslr_moves_the_region_with_the_seed() -> None:
    runs = [json.loads(vmemu("run", "--json", "--kaslr", "--seed", str(n), str(GUEST / "guard_page.asm")).stdout) for n in (1, 2)]
    assert runs[0][0]["faults"][0]["address"] != runs[1][0]["faults"][0]["address"]


def test_quiet_prints_one_line() -> None:
    run = vmemu("run", "-q", str(GUEST / "guard_page.asm"))
    assert run.stdout.count("\n") == 1


def test_verbose_shows_the_kernel_calls() -> None:
    run = vmemu("run", "-v", str(GUEST / "guard_page.asm"))
    assert "vmalloc(0x1000) = 0xffffc90000005000" in run.stdout


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m emu run {GUEST / 'guard_page.asm'} | head -n 1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(["sh", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0
    assert "Traceback" not in run.stderr
