"""From the fused projection to attention: norm and turn queries and keys, and put keys and values into the cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.rotary import rotate


@triton.jit
def _stored(x, dtype: tl.constexpr):
    """x as the cache takes it. What fp8 cannot reach becomes its largest number: on some paths it would be NaN."""
    if dtype == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -448.0), 448.0)
    return x.to(dtype)


@triton.jit
def _rope_and_store(
    qkv_ptr, q_ptr, keys_ptr, values_ptr, slots_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr,
    num_heads, num_kv_heads, eps,
    DIM: tl.constexpr, WIDE_DIM: tl.constexpr, ROTARY: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """One head of one token: queries go to `q`, keys and values to their slot."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, WIDE_DIM)
    there = dim < DIM
    row_ptr = qkv_ptr + (token * (num_heads + 2 * num_kv_heads) + head) * DIM
    x = tl.load(row_ptr + dim, mask=there, other=0.0)
    if head >= num_heads + num_kv_heads:
        slot = tl.load(slots_ptr + token)
        place = (slot * num_kv_heads + head - num_heads - num_kv_heads) * DIM
        tl.store(values_ptr + place + dim, _stored(x, values_ptr.dtype.element_ty), mask=there & (slot >= 0))
    else:
        x = x.to(tl.float32)
        # The partner that a dimension turns with stands half of the rotary dimensions away.
        partner = tl.where(dim < ROTARY // 2, dim + ROTARY // 2, dim - ROTARY // 2)
        turns = dim < ROTARY
        y = tl.load(row_ptr + partner, mask=turns, other=0.0).to(tl.float32)
        if HAS_NORM:
            norm_ptr = q_norm_ptr if head < num_heads else k_norm_ptr
            scale = 1.0 / tl.sqrt(tl.sum(x * x) / DIM + eps)
            x = x * scale * tl.load(norm_ptr + dim, mask=there, other=0.0).to(tl.float32)
            y = y * scale * tl.load(norm_ptr + partner, mask=turns, other=0.0).to(tl.float32)
        if ROTARY > 0:
            cos = tl.load(cos_ptr + token * ROTARY + dim, mask=turns, other=1.0).to(tl.float32)
            sin = tl.load(sin_ptr + token * ROTARY + dim, mask=turns, other=0.0).to(tl.float32)
            x = x * cos + y * sin
        x = x.to(qkv_ptr.dtype.element_ty)
        if head < num_heads:
            tl.store(q_ptr + (token * num_heads + head) * DIM + dim, x, mask=there)
        else:
            slot = tl.load(slots_ptr + token)
            place = (slot * num_kv_heads + head - num_heads) * DIM
            tl.store(keys_ptr + place + dim, _stored(x, keys_ptr.dtype.element_ty), mask=there & (slot >= 0))


def rope_and_store(
    qkv: Tensor, num_heads: int, keys: Tensor, values: Tensor, slots: Tensor,
    rope: tuple[Tensor, Tensor] | None, norms: tuple[Tensor, Tensor] | None, eps: float,
) -> Tensor:  # fmt: skip
    """The queries, normed and turned, [num_tokens, num_heads, head_dim]. Keys, likewise, and values go to the cache.

    qkv: [num_tokens, (num_heads + 2 num_kv_heads) * head_dim], contiguous; keys, values: [num_slots, num_kv_heads,
    head_dim], contiguous; slots: [num_tokens], negative for rows that only pad the batch and are stored nowhere; rope:
    cosines and signed sines, [num_tokens, 1, rotary_dim], as `Rotary.forward` gives them; norms: weights of the RMSNorm
    of each query and each key head, [head_dim].
    """
    num_kv_heads, dim = keys.shape[1:]
    q = torch.empty((len(qkv), num_heads, dim), dtype=qkv.dtype, device=qkv.device)
    cos, sin = (qkv, qkv) if rope is None else rope
    q_norm, k_norm = (qkv, qkv) if norms is None else norms
    _rope_and_store[(len(qkv), num_heads + 2 * num_kv_heads)](
        qkv, q, keys, values, slots, cos, sin, q_norm, k_norm, num_heads, num_kv_heads, eps,
        DIM=dim, WIDE_DIM=triton.next_power_of_2(dim), ROTARY=0 if rope is None else cos.shape[-1],
        HAS_NORM=norms is not None, num_warps=1,
    )  # fmt: skip
    return q


def rope_and_store_torch(
    qkv: Tensor, num_heads: int, keys: Tensor, values: Tensor, slots: Tensor,
    rope: tuple[Tensor, Tensor] | None, norms: tuple[Tensor, Tensor] | None, eps: float,
) -> Tensor:  # fmt: skip
    """The twin of `rope_and_store` in plain torch."""
    num_kv_heads, dim = keys.shape[1:]
    q, k, v = qkv.unflatten(-1, (-1, dim)).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    q, k = q.float(), k.float()
    if norms is not None:
        q, k = (torch.rms_norm(x, (dim,), norm.float(), eps) for x, norm in zip((q, k), norms, strict=True))
    if rope is not None:
        q, k = (rotate(x, *(table.float() for table in rope)) for x in (q, k))
    keys.index_copy_(0, slots, k.to(keys.dtype))
    values.index_copy_(0, slots, v.to(values.dtype))
    out: Tensor = q.to(qkv.dtype)
    return out
