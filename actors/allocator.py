"""The C allocator of a trainer on the CPU."""

from __future__ import annotations

import ctypes
import platform


def return_freed_memory() -> None:
    """Give the freed parts of the heap back to the operating system. Nothing outside glibc.

    Call it between the last backward pass, which frees the activations, and the optimizer step, which
    allocates for all parameters at once. glibc by itself keeps freed blocks below 32 MiB, so the two
    would add up: seen with 37 M parameters and 4,096 positions, 2.24 GB at the peak instead of 2.02, at
    no measurable cost in time.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
