"""How the kernels of the CPU backend are compiled."""

# Numba compiles what follows; to a type checker it is untyped.
# pyright: basic
import types

import numba
import torch

FAST = {"reassoc", "contract", "nsz", "arcp", "afn"}  # not "nnan": what is not finite must come out as such

inlined = numba.njit(inline="always", fastmath=FAST, error_model="numpy")
"""Decorator of what kernels are put together from."""

serial = numba.njit(cache=True, fastmath=FAST, error_model="numpy")
"""Decorator of a kernel for one thread."""


def by_threads(function):
    """Return two kernels of a function with a ``prange``: ``{False: for one thread, True: for several}``.

    A pool of one would do instead, but its idle threads spin beside those of torch.
    """
    return {parallel: _compiled(function, parallel) for parallel in (False, True)}


def _compiled(function, parallel):
    # A copy with a name of its own: Numba's cache on disk tells functions apart by name, not by their options.
    copy = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    copy.__qualname__ = f"{function.__name__}_{'parallel' if parallel else 'serial'}"
    return numba.njit(parallel=parallel, cache=True, fastmath=FAST, error_model="numpy")(copy)


def several_threads() -> bool:
    """Say whether several threads work, and set their number to torch's."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # pyright: ignore
    if threads > 1:
        numba.set_num_threads(threads)
    return threads > 1
