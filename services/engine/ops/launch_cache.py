"""Launches of Triton kernels without what is known from the launch before.

Triton binds, specialises and looks up a kernel's arguments anew each time, which takes the host longer than
the launch itself, and a prefill step has some hundred launches. A `cached_kernel` kernel keeps what was
compiled for arguments that Triton would treat alike: same dtypes, same constants, pointers aligned alike, and
integers that are one, multiples of 16 and of 32 bits alike. It is called as any other, `kernel[grid](...)`,
with every constant by its name.

How a compiled kernel is launched is internal to Triton. So the source of Triton's own launch is compared with
the one that is copied here, once, when this is imported; if it differs, every launch goes through Triton.

Compiled one after the other, each at its first launch, the kernels of a model take half a minute.
`compiling_ahead` is for a rehearsal of what will be launched: it has them compiled side by side.
"""

import ast
import inspect
import logging
import os
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import triton
from torch import Tensor
from triton import AsyncCompileMode
from triton.runtime import driver
from triton.runtime.jit import JITFunction

logger = logging.getLogger(__name__)

_TRITONS_CALLS = {
    "driver.active.get_current_stream(device)",
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())",
}
"""What Triton 3.6 and 3.7 do to launch a compiled kernel with all its arguments, constants among them."""
_LARGEST_INT32 = 2**31 - 1
_ALIGNMENT_BYTES = 16

Grid = tuple[int, ...]


def launches_as_known(run: Callable[..., Any]) -> bool:
    """Whether `run`, by which Triton launches a kernel, does it as `CachedKernel` does."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(run)))
    except (OSError, TypeError, SyntaxError):
        return False
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)} >= _TRITONS_CALLS


class CachedKernel:
    """A kernel that is launched, not one that others call."""

    is_bypassing = launches_as_known(JITFunction.run)
    """Whether launches may do without Triton, those of all kernels."""
    compiles_only = False
    """Whether launches only compile, those of all kernels."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self._compiles = isinstance(function, JITFunction)
        """Not under the interpreter."""
        self._known: dict[tuple[object, ...], tuple[Any, ...]] = {}

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: Grid, *arguments: Any, **constants: Any) -> None:
        device = _device_of(arguments[0])
        if device >= 0 and self._compiles and CachedKernel.compiles_only:
            self.function.warmup(*arguments, grid=grid, **constants)
            return
        if device < 0 or not self._compiles or not CachedKernel.is_bypassing:
            self.function[grid](*arguments, **constants)
            return
        key = (device, *constants, *constants.values(), *map(_kind_of, arguments))
        known = self._known.get(key)
        if known is None:
            compiled = self.function[grid](*arguments, **constants)
            rest = tuple(constants[name] for name in self.function.arg_names[len(arguments) :])
            self._known[key] = (compiled, compiled.function, compiled.packed_metadata, rest)
            return
        compiled, function, metadata, rest = known
        width, height, depth = (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)
        compiled.run(width, height, depth, stream, function, metadata, None, None, None, *arguments, *rest)


def warn_if_slow() -> None:
    """Say so where every launch goes through Triton: steps are right, and held up by the host."""
    if not CachedKernel.is_bypassing:
        logger.warning(
            "Triton %s launches kernels in a way that is not known here (known: 3.6, 3.7): every launch goes "
            "through it, which makes prefill slower",
            triton.__version__,
        )


def cached_kernel(function: Any) -> Any:
    """A decorator above `triton.jit`. Any, like what that gives: parameters are those of the kernel."""
    return CachedKernel(function)


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Within it no kernel on a GPU is launched, and what a launch would have compiled is compiled by as many
    threads as there are cores: MLIR, LLVM and the assembler do without Python's lock. Leaving it waits for
    all. What kernels would have written is left as it was, so nothing may be looked up by it."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads, AsyncCompileMode(threads):
        CachedKernel.compiles_only = True
        try:
            yield
        finally:
            CachedKernel.compiles_only = False


def cdiv(number: int, divisor: int) -> int:
    """`triton.cdiv`, which on the host takes longer than a launch's other arithmetic together."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """`triton.next_power_of_2`; the least is 1."""
    return 1 << (number - 1).bit_length() if number > 1 else 1


def _device_of(argument: Any) -> int:
    """Negative on a CPU."""
    return int((argument if isinstance(argument, Tensor) else argument.base).get_device())


def _kind_of(argument: Any) -> object:
    """What two arguments have in common that Triton compiles one kernel for, or something narrower."""
    if isinstance(argument, int):  # as one number: this is asked some 3000 times a step
        return (argument == 1) + 2 * (argument % 16 == 0) + 4 * (argument > _LARGEST_INT32)
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % _ALIGNMENT_BYTES == 0
    if isinstance(argument, float):
        return float
    # A descriptor of tiles; its layout in shared memory follows from these where it has one.
    return argument.base.dtype, tuple(argument.block_shape)
