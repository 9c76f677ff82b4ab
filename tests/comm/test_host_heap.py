"""Freed memory stays with the process, so that the next allocation takes no page faults."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

PAGE = 4096
BLOCK = 64 << 20

PROGRAM = f"""
import ctypes, resource
from cp_megatron.comm.host_heap import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc({BLOCK})
    libc.memset(block, 1, {BLOCK})
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
default = faults()
keep_freed_memory()
faults()
print(default, faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc has this function")
def test_a_freed_block_is_written_again_without_page_faults() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    default, kept = map(int, ran.stdout.split())
    assert default >= BLOCK / PAGE / 1024, "by default the block's pages are new, small or huge"
    assert kept <= 4
