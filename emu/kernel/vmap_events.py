"""The tracepoints events/vmalloc/* as trace_pipe prints them (v6.12 include/trace/events/vmalloc.h; since v6.2)."""

from __future__ import annotations

_FORMATS = {
    "alloc_vmap_area": "va_start: {0} size={1} align={2} vstart=0x{3:x} vend=0x{4:x} failed={5}",
    "purge_vmap_area_lazy": "start=0x{0:x} end=0x{1:x} num_purged={2}",
    "free_vmap_area_noflush": "va_start=0x{0:x} nr_lazy={1} nr_lazy_max={2}",
}


def tracepoint_text(name: str, values: tuple[int, ...]) -> str:
    """The text after "NAME: " for the values that VmapSpace.tracepoint got. Raises ValueError for another event."""
    if name not in _FORMATS:
        raise ValueError(f"tracepoint is {name!r}; known are {', '.join(_FORMATS)}")
    return _FORMATS[name].format(*values)
