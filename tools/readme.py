"""Rewrite the console blocks of the documents with what their commands print now: `python tools/readme.py [--check]`.

A block is fenced by ```console and holds commands behind "$ "; only `vmemu` commands, and `head` or `tail` behind a pipe, are run.
With --check nothing is written, and the status is 1 when any block is out of date.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = (README, ROOT / "docs" / "tlbsan.md", ROOT / "docs" / "history.md", ROOT / "docs" / "perfetto.md")
_BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def output_of(command: str) -> str:
    """What a documented command prints; its arguments are relative to the repository. Raises ValueError for any other program."""
    words = shlex.split(command.partition("|")[0])
    if not words or words[0] != "vmemu":
        raise ValueError(f"only vmemu commands are run, not {command!r}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    run = subprocess.run(
        [sys.executable, "-m", "emu", *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
        check=False,
    )
    text = run.stdout + run.stderr
    tail = command.partition("|")[2].split()
    if tail:
        if tail[:2] not in (["head", "-n"], ["tail", "-n"]) or len(tail) != 3:
            raise ValueError(f"only `| head -n N` and `| tail -n N` are understood, not {command!r}")
        count = int(tail[2])
        lines = text.splitlines()
        text = "".join(line + "\n" for line in (lines[:count] if tail[0] == "head" else lines[-count:]))
    return text


def refreshed(text: str) -> str:
    """The text with every console block's output renewed."""

    def renew(match: re.Match[str]) -> str:
        commands = [line[2:] for line in match[1].splitlines() if line.startswith("$ ")]
        body = "".join(f"$ {command}\n{output_of(command)}" for command in commands)
        return f"```console\n{body}```"

    return _BLOCK.sub(renew, text)


def main() -> int:
    """Refresh or check; returns the exit status."""
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        print("usage: python tools/readme.py [--check]", file=sys.stderr)
        return 2
    outdated = 0
    for document in DOCUMENTS:
        old = document.read_text()
        new = refreshed(old)
        if new != old:
            outdated = 1
            if not check:
                document.write_text(new)
    return outdated if check else 0


if __name__ == "__main__":
    sys.exit(main())
