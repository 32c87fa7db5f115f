"""glibc's allocator, set up for large activations.

By default glibc returns every block above 128 kB (later up to 32 MB) to the kernel as soon as it is freed, so each call of a
network maps and zeroes its activations again. With mapping switched off and trimming put off, freed memory is kept and used
again: the price is that a process holds on to its peak. Only the commands do this, in their own process and never on
import; `PAPERZOO_KEEP_MEMORY=0` switches it off.
"""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_memory() -> bool:
    """Keep freed memory for the next call; False where the C library is not glibc, or it was switched off."""
    if os.environ.get("PAPERZOO_KEEP_MEMORY", "1") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    done = libc.mallopt(M_MMAP_MAX, 0) == 1
    done &= libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1) == 1
    return bool(done & (libc.mallopt(M_TOP_PAD, 64 * 2**20) == 1))
