"""Tests against recordings stand on the same kernel as the tests of the kernel model."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernel"))
