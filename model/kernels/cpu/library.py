"""The native library through ctypes: its structs, twins of those in `native.h` and `model.h`, and its functions.

A call releases the interpreter lock.
"""

import ctypes
from ctypes import CFUNCTYPE, POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from model.kernels.cpu.build import build

INSTRUCTION_SETS = ("portable", "avx2", "avx512")  # from the plainest to the best
PANEL = 32  # output channels of a weight panel
INT8, BF16 = 0, 1
NORMS = {"rms": 1, "layer": 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
STORE, ADD, ACTIVATE, GATE, CAP = range(5)


def _fields(**types: Any) -> list[tuple[str, Any]]:
    return list(types.items())


class Norm(Structure):
    """See native.h. All zeros: no norm."""

    _fields_ = _fields(weight=c_void_p, bias=c_void_p, eps=c_float, kind=c_int32)


class Linear(Structure):
    """See native.h."""

    _fields_ = _fields(
        weight=c_void_p, scale=c_void_p, bias=c_void_p, correction=c_void_p,
        inputs=c_int64, stride=c_int64, panels=c_int64, dtype=c_int32,
    )  # fmt: skip


class Rows(Structure):
    """See native.h."""

    _fields_ = _fields(data=c_void_p, scale=c_void_p, count=c_int64, stride=c_int64)


class Epilogue(Structure):
    """See native.h."""

    _fields_ = _fields(out=c_void_p, stride=c_int64, cap=c_float, then=c_int32, activation=c_int32)


class Attention(Structure):
    """See native.h."""

    _fields_ = _fields(
        cache=c_void_p, sinks=c_void_p,
        num_heads=c_int64, num_kv_heads=c_int64, head_dim=c_int64, padded_dim=c_int64, block_size=c_int64,
        groups=c_int64, group_bytes=c_int64, window=c_int64, sink_tokens=c_int64, scale=c_float, softcap=c_float,
    )  # fmt: skip


class Query(Structure):
    """See native.h."""

    _fields_ = _fields(q=c_void_p, position=c_int64)


class Softmax(Structure):
    """See native.h."""

    _fields_ = _fields(largest=c_float * 12, total=c_float * 12, weighted=c_void_p)


class Experts(Structure):
    """See model.h. All zeros: there are none."""

    _fields_ = _fields(
        router=c_void_p, up=c_void_p, down=c_void_p, count=c_int64, num_chosen=c_int64, normalize=c_int64
    )  # fmt: skip


class Layer(Structure):
    """See model.h."""

    _fields_ = _fields(
        attention_norm=Norm, attention_post_norm=Norm, mlp_norm=Norm, mlp_post_norm=Norm, q_norm=Norm, k_norm=Norm,
        qkv=Linear, output=Linear, up=Linear, down=Linear, experts=Experts, attention=Attention, cos=c_void_p,
        sin=c_void_p, rotary_half=c_int64, activation=c_int32, gated=c_int32, norm_whole=c_int32,
    )  # fmt: skip


class Model(Structure):
    """See model.h."""

    _fields_ = _fields(
        embedding=c_void_p, position_embedding=c_void_p, layers=c_void_p, norm=Norm, head=Linear,
        vocab_size=c_int64, hidden_size=c_int64, num_layers=c_int64, max_positions=c_int64, num_blocks=c_int64,
        max_tokens=c_int64, num_threads=c_int64, embedding_scale=c_float, final_cap=c_float, instruction_set=c_int32,
        cache_dtype=c_int32,
    )  # fmt: skip


class Batch(Structure):
    """See model.h."""

    _fields_ = _fields(
        token_ids=c_void_p, positions=c_void_p, query_start_loc=c_void_p, block_tables=c_void_p, sample_rows=c_void_p,
        logits=c_void_p, largest=c_void_p, likeliest=c_void_p, queries=c_void_p,
        num_tokens=c_int64, num_seqs=c_int64, max_blocks=c_int64, num_samples=c_int64,
    )  # fmt: skip


class Verdict(Structure):
    """See model.h."""

    _fields_ = _fields(refusal=c_int64, index=c_int64, value=c_int64)


_LINEAR = CFUNCTYPE(None, POINTER(Linear), POINTER(Rows), c_int64, POINTER(Epilogue), c_int64)


class CacheKernels(Structure):
    """See native.h."""

    _fields_ = _fields(
        query_bytes=CFUNCTYPE(c_int64, c_int64),
        encode_query=CFUNCTYPE(None, c_void_p, c_int64, c_void_p, c_int64),
        store=CFUNCTYPE(None, POINTER(Attention), c_int64, c_int64, c_void_p, c_void_p),
        attend=CFUNCTYPE(
            None, POINTER(Attention), c_void_p, POINTER(Query), c_int64, c_int64, c_int64, c_int64, POINTER(Softmax)
        ),
    )


class Kernels(Structure):
    """See native.h: one instruction set's kernels, each callable on its own."""

    _fields_ = _fields(
        embed=CFUNCTYPE(None, c_void_p, c_int64, c_float, c_void_p),
        add_scaled=CFUNCTYPE(None, c_void_p, c_void_p, c_float, c_int64),
        normalize=CFUNCTYPE(None, POINTER(Norm), c_void_p, c_int64, c_void_p),
        encode_int8=CFUNCTYPE(None, c_void_p, c_int64, c_void_p, c_int64, c_void_p),
        encode_bf16=CFUNCTYPE(None, c_void_p, c_int64, c_void_p, c_int64),
        linear_int8=_LINEAR,
        linear_bf16=_LINEAR,
        rotate=CFUNCTYPE(None, c_void_p, c_void_p, c_void_p, c_int64),
        merge=CFUNCTYPE(None, POINTER(Softmax), POINTER(Softmax), c_int64, c_int64),
        route=CFUNCTYPE(None, c_void_p, c_void_p, c_int64, c_int64, c_void_p),
        likeliest=CFUNCTYPE(None, c_void_p, c_int64, c_void_p, c_void_p),
        finish=CFUNCTYPE(None, POINTER(Attention), POINTER(Softmax), c_int64, c_int64, c_void_p),
        cache=CacheKernels * 2,
    )


class Library:
    """The functions of a compiled library."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.create = self._function(library.native_create, c_void_p, POINTER(Model))
        self.destroy = self._function(library.native_destroy, None, c_void_p)
        self.hidden = self._function(library.native_hidden, c_void_p, c_void_p)
        self.step = self._function(library.native_step, None, c_void_p, POINTER(Batch), POINTER(Verdict))
        self.head = self._function(library.native_head, None, c_void_p, c_void_p, c_int64, c_int64, c_void_p)
        self._kernels = self._function(library.native_kernels, POINTER(Kernels), c_int32)
        count = self._function(library.native_instruction_sets, c_int32)()
        self.instruction_sets = INSTRUCTION_SETS[:count]  # what this machine can run

    def kernels(self, instruction_set: str) -> Kernels:
        """The kernels of one of `instruction_sets`."""
        kernels: Kernels = self._kernels(INSTRUCTION_SETS.index(instruction_set)).contents
        return kernels

    @staticmethod
    def _function(function: Any, returns: Any, *arguments: Any) -> Any:
        function.restype, function.argtypes = returns, arguments
        return function


@cache
def load() -> Library:
    """The library of this machine, compiled first if need be. Raises `NoLibrary`."""
    return Library(build())
