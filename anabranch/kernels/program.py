"""Native programs: a step's calls of compiled kernels, noted once and run as one call that holds no GIL.

While a step is recorded it is computed as ever. Two things are watched: every native call is noted with its
arguments, and every PyTorch operation is looked at. Allocations are answered from an arena, views are let pass,
and anything else would be missing from the program, so the recording is thrown away.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from ctypes import c_int, c_int64, c_long, c_void_p
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anabranch.kernels.arena import Arena
from anabranch.kernels.record import Recording
from anabranch.parallel.group import Group, NativeGroup

MAX_ARGUMENTS = 15
REDUCE = "reduce"
get_num_threads = torch.get_num_threads


class Op(ctypes.Structure):
    """A call with the bits of its arguments; `Op` of cpu/program.h."""

    _fields_ = (("call", c_void_p), ("arguments", c_int64 * MAX_ARGUMENTS))


@dataclass(frozen=True)
class NativeFunction:
    """A compiled function.

    Attributes:
        name: in the library.
        held, released: calls of it that keep the GIL, and that release it.
    """

    name: str
    held: Callable[..., int | None]
    released: Callable[..., int | None]

    def run(self, release: bool) -> Callable[..., int | None]:
        """Short calls keep the GIL, long ones release it."""
        return self.released if release else self.held


class NativeProgram:
    """A recorded step of native calls; a `Program`.

    Args:
        ops: the calls, in order.
        errors: what a call's code means, for those that can fail; by their places.
        held: what the calls point to.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        ops: Sequence[Op],
        errors: dict[int, Callable[[int], Exception]],
        output: torch.Tensor,
        held: Sequence[object],
    ) -> None:
        self.output = output
        self.num_ops = len(ops)
        self._run = library.ab_run_program
        self._ops = (Op * len(ops))(*ops)
        self._errors = errors
        self._held = held
        self._num_threads = get_num_threads()
        self._place = c_long()

    def run(self) -> None:
        """See `Program.run`."""
        code = self._run(self._ops, self.num_ops, self._num_threads, ctypes.byref(self._place))
        if code:
            raise self._errors[self._place.value](code)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes one step down; active while it is computed, on the thread that made it.

    Other threads use the same kernels meanwhile (KV that arrives is stored by the transport's): they go unnoted.

    Args:
        library: from `load_library`.
        arena: where the step's tensors are made; shared by programs that never run at the same time.
    """

    def __init__(self, library: ctypes.CDLL, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._library = library
        self._arena = arena
        self._ops: list[Op] = []
        self._held: list[object] = [arena]
        self._errors: dict[int, Callable[[int], Exception]] = {}
        self._obstacle: str | None = None
        self._thread = threading.get_ident()

    def finish(self, output: torch.Tensor) -> Recording:
        """The step's result, and the program if nothing stood in the way."""
        if self._obstacle is None and not (self._arena.holds(output) and output.is_contiguous()):
            self._obstacle = "a result that no native call wrote"
        if self._obstacle is not None:
            return Recording(output=output, program=None, obstacle=self._obstacle)
        output = self._arena.borrow(output)
        program = NativeProgram(self._library, self._ops, self._errors, output, self._held)
        return Recording(output=output, program=program)

    def watch(self, function: NativeFunction) -> NativeFunction:
        """The same function, noted whenever it is called."""

        def noted(call: Callable[..., int | None]) -> Callable[..., int | None]:
            def run(*arguments: object) -> int | None:
                if threading.get_ident() == self._thread:
                    self._note(function.name, arguments)
                return call(*arguments)

            return run

        return NativeFunction(function.name, noted(function.held), noted(function.released))

    def reduce(self, x: torch.Tensor, group: Group) -> None:
        """Note a sum over ranks that is about to be computed in x's memory."""
        native = group.native_all_reduce(x) if isinstance(group, NativeGroup) else None
        if native is None:
            self._obstacle = self._obstacle or "a sum over ranks that has no native call"
            return
        self._errors[len(self._ops)] = native.error
        self._held.append(native)
        self._note(REDUCE, (native.function, native.handle, x.data_ptr(), x.numel(), native.dtype))

    def _note(self, name: str, arguments: Sequence[object]) -> None:
        call = self._library.ab_find_op(name.encode())
        if not call:
            self._obstacle = self._obstacle or name
            return
        op = Op(call=call)
        for place, argument in enumerate(arguments):
            if isinstance(argument, float):
                op.arguments[place] = struct.unpack("<I", struct.pack("<f", argument))[0]
            elif isinstance(argument, ctypes.Structure):
                self._held.append(argument)
                op.arguments[place] = ctypes.addressof(argument)
            else:
                assert argument is None or isinstance(argument, int)
                op.arguments[place] = argument or 0
        self._ops.append(op)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format and self._is_plain(args, kwargs):
            shape, dtype = args[0], kwargs["dtype"]
            assert isinstance(shape, Sequence)
            assert isinstance(dtype, torch.dtype)
            return self._arena.empty(shape, dtype)
        result = func(*args, **kwargs)
        if not self._is_view(func, args, result):
            self._obstacle = self._obstacle or str(func)
        return result

    @staticmethod
    def _is_plain(args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
        """Whether `torch.empty(shape, dtype=...)` of at least one element was asked for."""
        shape, device = args[0], kwargs.get("device") or torch.device("cpu")
        return (
            isinstance(shape, Sequence)
            and all(shape)
            and isinstance(kwargs.get("dtype"), torch.dtype)
            and isinstance(device, torch.device)
            and device.type == "cpu"
            and not kwargs.get("pin_memory")
            and kwargs.get("memory_format") is None
        )

    @staticmethod
    def _is_view(func: torch._ops.OpOverload, args: tuple[object, ...], result: object) -> bool:
        """Whether an operation wrote nothing, and all that it gave is its first argument's memory."""
        if func._schema.is_mutable or not args or not isinstance(args[0], torch.Tensor):
            return False
        memory = args[0].untyped_storage().data_ptr()
        results = result if isinstance(result, (tuple, list)) else (result,)
        return all(isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() == memory for x in results)


def declare(library: ctypes.CDLL) -> None:
    """Types of the functions that are called from here."""
    library.ab_find_op.argtypes, library.ab_find_op.restype = [ctypes.c_char_p], c_void_p
    library.ab_run_program.argtypes = [c_void_p, c_long, c_int, c_void_p]
    library.ab_run_program.restype = c_int
