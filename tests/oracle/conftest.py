"""Tests against recordings stand on the kernel of the tests of the kernel model, and on the CPUs of those of the ledger."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("ledger", "kernel"):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / folder))
