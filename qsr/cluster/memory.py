"""Settings of the C library's memory allocator."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Constants of glibc's malloc.h."""
_LARGEST_MAPPING_BYTES = 2**25
"""The largest threshold that every glibc accepts, see mallopt(3); larger blocks are still mapped
and unmapped individually."""
_NEVER_BYTES = 2**31 - 1


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for the next tensor.

    By default it returns memory to the kernel whenever a few megabytes are free, and the next step
    requests new pages, which must be zeroed. On the CPU, where activations are allocated this way,
    that costs a few per cent, sometimes a fifth, of a step with activations of megabytes, and
    nothing with small ones. Peak memory does not grow (benchmarks/host_memory.py). Works with glibc
    only; has no effect elsewhere.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MAPPING_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER_BYTES)
