"""The compiled library's functions, with their types.

The calls are made through ctypes with raw addresses: the whole cost of a call is a few microseconds, which
at batch 1 is what there is. Short ones keep the GIL, long ones release it.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p
from dataclasses import dataclass, fields

from anabranch.kernels.program import NativeFunction, Recorder, declare


class AttentionShape(ctypes.Structure):
    """What a batch and a model fix of an attention call; `AttentionShape` of cpu/kernels.cpp."""

    _fields_ = (
        *[
            (name, ctypes.c_int64)
            for name in (
                "q_stride_t",
                "q_stride_h",
                "table_width",
                "num_sequences",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "block_size",
                "window",
                "max_short",
                "whole",
            )
        ],
        ("scale", c_float),
    )


@dataclass(frozen=True, kw_only=True)
class Functions:
    """The compiled functions, by what they compute."""

    rms_norm: NativeFunction
    add_rms_norm: NativeFunction
    silu_mul: NativeFunction
    rotary: NativeFunction
    store_kv: NativeFunction
    export_kv: NativeFunction
    import_kv: NativeFunction
    linear: NativeFunction
    attention_short: NativeFunction
    attention_long: NativeFunction
    argmax: NativeFunction

    def watched(self, recorder: Recorder) -> Functions:
        """The same, noted by a recorder."""
        functions = {field.name: getattr(self, field.name) for field in fields(self)}
        return Functions(**{name: recorder.watch(function) for name, function in functions.items()})


def bind_functions(library: ctypes.CDLL, suffix: str) -> Functions:
    """The library's functions for a dtype, with their types."""
    held = ctypes.PyDLL(library._name)
    pointer, number = c_void_p, c_long

    def bind(name: str, *types: object, result: type[c_int] | None = None) -> NativeFunction:
        functions = getattr(held, name), getattr(library, name)
        for function in functions:
            function.argtypes = types
            function.restype = result
        return NativeFunction(name, *functions)

    declare(library)
    attention = *[pointer] * 8, ctypes.POINTER(AttentionShape), c_int
    return Functions(
        rms_norm=bind(f"ab_rms_norm_{suffix}", *[pointer] * 3, *[number] * 5, c_float, c_int),
        add_rms_norm=bind(f"ab_add_rms_norm_{suffix}", *[pointer] * 5, *[number] * 2, c_float, c_int),
        silu_mul=bind(f"ab_silu_mul_{suffix}", *[pointer] * 2, *[number] * 3, c_int),
        rotary=bind(f"ab_rotary_{suffix}", *[pointer] * 4, *[number] * 6, c_int),
        store_kv=bind("ab_store_kv", *[pointer] * 5, *[number] * 7, c_int),
        export_kv=bind("ab_export_kv", *[pointer] * 4, *[number] * 5, c_int),
        import_kv=bind("ab_import_kv", *[pointer] * 3, *[number] * 5),
        linear=bind(f"ab_linear_{suffix}", *[pointer] * 4, *[number] * 5, c_int, c_int),
        attention_short=bind(f"ab_attention_short_{suffix}", *attention),
        attention_long=bind(f"ab_attention_long_{suffix}", *attention, result=c_int),
        argmax=bind(f"ab_argmax_{suffix}", *[pointer] * 2, *[number] * 3, c_int),
    )
