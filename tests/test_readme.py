"""The README tells the truth: its outputs are what the commands print, its commands are what CI runs, its links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import readme  # noqa: E402

TEXT = readme.README.read_text()
BLOCKS = [
    match[0] for document in readme.DOCUMENTS for match in re.finditer(r"```console\n.*?```", document.read_text(), re.DOTALL)
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[1][2:60])
def test_a_console_block_shows_what_its_commands_print(block: str) -> None:
    assert readme.refreshed(block) == block


def test_ci_runs_the_second_command_to_the_letter() -> None:
    commands = re.findall(r"```sh\n(.*?)\n```", TEXT, re.DOTALL)
    assert len(commands) == 2
    assert all("\n" not in command for command in commands)
    assert commands[1] in (ROOT / ".ci" / "run").read_text()


def test_every_relative_link_of_the_documents_leads_to_a_file() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_file_and_folder_that_the_readme_names_exists() -> None:
    for name in re.findall(r"\b((?:tests|tools|emu|guest|docs)/[\w/.-]*\w)", TEXT):
        assert (ROOT / name).exists(), name
