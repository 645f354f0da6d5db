"""Runs kernels without a GPU: an interpreter of the PTX that NVRTC makes of them.

All threads of a grid are one axis of numpy arrays, and those at one place of the program take its instruction together.
It is stricter than a GPU, and raises `Fault` for

- global memory outside the buffers, shared memory outside what the launch asked for, addresses that are not aligned;
- deadlocks, and warps that are not whole at instructions that take warps;
- with ``races``, two threads that use the same 16 bits of shared memory, one of them to write, with no barrier of the
  block between (it does not know what mbarriers order).

Shared memory holds NaN at first. Where a copy is on its way there is NaN too: cp.async lands when its thread waits for
it, bulk copies and sums for other blocks when no thread can go on without.

Source: NVIDIA, "Parallel Thread Execution ISA", 9.0; only what the kernels use of it. An mma adds in float64, and a
wgmma is over when it is issued.
"""

from .memory import Fault as Fault
from .memory import Memory as Memory
from .program import Kernel as Kernel
from .run import Run as Run
