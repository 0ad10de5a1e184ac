"""vmemu: an emulated x86-64 machine for work on Linux's kernel mappings."""

__version__ = "0.1.0"
