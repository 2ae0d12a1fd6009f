"""How the C library gives this process its memory."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
_LARGEST_MAPPING_BYTES = 2**25
"""The most that every glibc takes, mallopt(3): larger pieces come and go by themselves."""
_NEVER_BYTES = 2**31 - 1


def keep_freed_memory() -> None:
    """Have the C library keep memory that was freed, for the next tensor.

    By default it gives it back to the kernel whenever some megabytes are free, and asks for new
    pages, which must be cleared, in the next step. On the CPU, where activations come from it, that
    takes some per cent of a step whose activations have megabytes, sometimes a fifth, and none of
    one with small ones; at its peak the process takes no more memory (benchmarks/host_memory.py).
    For glibc only; elsewhere nothing changes.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MAPPING_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER_BYTES)
