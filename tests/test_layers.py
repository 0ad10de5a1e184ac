"""The layers of the package: a module imports only what stands to the right of it, and nothing runs back up."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    ["emu.cli", "emu.__main__"],
    ["emu.debug"],
    ["emu.report", "emu.progress"],
    ["emu.run", "emu.explore"],
    ["emu.machine", "emu.start_cpu", "emu.load_module", "emu.watchdog"],
    ["emu.config"],
    ["emu.tlbsan"],
    ["emu.hub", "emu.turns", "emu.visible"],
    [
        "emu.cpu", "emu.native", "emu.privileged", "emu.privileged_step", "emu.transfers", "emu.msr", "emu.exceptions",
        "emu.cpuid", "emu.engine", "emu.engine_context", "emu.engine_registers", "emu.block_counter", "emu.instruction_counter",
        "emu.code_pages", "emu.code_reader", "emu.interception", "emu.stop_reason", "emu.privileged_opcodes",
        "emu.operands", "emu.decode", "emu.rflags", "emu.translate_ahead", "emu.native_log",
    ],
    ["emu.kernel"],
    ["emu.guest"],
    ["emu.mmu"],
    ["emu.memory"],
    ["emu.trace", "emu.descriptors"],
]
# The CPU and the kernel model do not know each other: the machine joins them. Guests are files; only memory is beneath them.
STRANGERS = [("emu.cpu", "emu.kernel"), ("emu.cpu", "emu.guest"), ("emu.kernel", "emu.guest")]
ENGINE_ONLY_IN = {
    "emu.engine", "emu.engine_context", "emu.engine_registers", "emu.block_counter", "emu.instruction_counter", "emu.native",
    "emu.code_reader", "emu.native_log",
}


def module_name(path: Path) -> str:
    """Dotted name of a file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(name: str) -> int | None:
    """Index of the layer that a module belongs to, None for the package itself."""
    for level, prefixes in enumerate(LAYERS):
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes):
            return level
    return None


def imports(path: Path) -> list[tuple[int, str]]:
    """Every imported module of a file with its line, those inside functions and type-checking blocks included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.lineno, node.module))
    return found


MODULES = sorted(p for p in (ROOT / "emu").rglob("*.py") if "include" not in p.parts)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_imports_only_from_its_own_layer_or_the_layers_beneath(path: Path) -> None:
    name = module_name(path)
    level = layer_of(name)
    assert level is not None or name == "emu", f"{name} stands in no layer: add it to LAYERS"
    for line, imported in imports(path):
        if imported.split(".")[0] == "unicorn":
            assert name in ENGINE_ONLY_IN, f"{path}:{line}: only the engine's files may import unicorn"
        target = layer_of(imported) if imported.startswith("emu.") else None
        if target is None:
            continue
        assert level is not None and level <= target, f"{path}:{line}: {name} may not import {imported}"
        for one, other in STRANGERS:
            pair = {layer_of(one), layer_of(other)}
            assert {level, target} != pair, f"{path}:{line}: {name} and {imported} may not know each other"


def test_the_layer_test_knows_every_module() -> None:
    assert len(MODULES) > 10
