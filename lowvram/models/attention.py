"""The only attention of the package.

Key and value heads are never repeated in memory and scores are never held whole, on any device.
Where no mask tensor is needed one fused kernel does the work; elsewhere keys go by in blocks with a
running softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; Rabe and Staats 2021,
arXiv:2112.05682). Which way is taken, and every block size, depends on shapes and device alone.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

QUERY_BLOCK = 256
KEY_BLOCK = 512
# Few query rows take more keys at a time, for as many scores: a block costs a dozen launches.
LONGEST_KEY_BLOCK = 8192

CAUSAL_ROWS = 64
"""Rows of a block on the CPU, of every query head."""

_LOWER_RIGHT = 2
"""The mask of torch's memory-efficient kernel: `CausalVariant` of torch/nn/attention/bias.py."""

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax attention with grouped heads.

    Args:
        q: [B, Hq, Tq, D].
        k, v: [B, Hkv, Tk, D]; Hkv divides Hq, and query head h reads key head h // (Hq / Hkv).
        causal: the last query sees every key, the one before it all but the last, and so on
            (aligned lower-right); needs Tk >= Tq.
        scale: of the scores; D ** -0.5 by default.
        bias: fp32 [Tk], added to the scores of a single row, and then all that hides keys.

    Returns:
        [B, Hq, Tq, D] in the type of `q`; accumulated in fp32. On `meta` only this is allocated.

    Raises:
        ValueError: shapes that do not fit together.
    """
    batch, heads, rows, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    # Without a row or a key the fused kernel of the CPU divides by zero, and ends the process.
    if heads % kv_heads or (causal and keys < rows) or not (rows and keys):
        raise ValueError(
            f"{heads} query heads of {rows} rows on {kv_heads} key heads of {keys} keys "
            f"(causal={causal}); wanted a multiple of heads, and rows, and at least as many keys"
        )
    if q.device.type == "meta":
        return torch.empty_like(q)
    if bias is not None and rows != 1:
        raise ValueError(f"a bias for {rows} rows; wanted one row")
    scale = width**-0.5 if scale is None else scale
    if not causal or rows == 1:
        # Without a mask, the query heads that read one key head can pass as rows of one head.
        folded = q.reshape(batch, kv_heads, heads // kv_heads * rows, width)
        if bias is not None:
            return _biased(folded, k, v, scale, bias).reshape(q.shape)
        return _unmasked(folded, k, v, scale).reshape(q.shape)
    if q.device.type == "cpu":
        return _causal_cpu(q, k, v, scale)
    if q.device.type == "cuda" and (out := _causal_cuda(q, k, v, scale)) is not None:
        return out
    return blockwise(q, k, v, causal=True, scale=scale)


def _unmasked(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Every row sees every key; equal numbers of heads."""
    if q.device.type == "cpu":
        flashed: Tensor = _flash_cpu(q, k, v, scale=scale)[0]
        return flashed
    if q.device.type == "cuda":
        out = _fused_cuda(q, k, v, scale, causal=False)
        return blockwise(q, k, v, causal=False, scale=scale) if out is None else out
    if _backend_has_attention():
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return blockwise(q, k, v, causal=False, scale=scale)


def _biased(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor) -> Tensor:
    """Every row sees every key but for the bias; equal numbers of heads. Plain products: no fused
    kernel takes a bias and reads few rows' keys on all processors. Only scores are held whole."""
    batch, heads = q.shape[:2]
    queries, keys, values = (t.flatten(0, 1) for t in (q, k, v))
    turned = keys.transpose(1, 2)
    if q.device.type == "cuda" and q.dtype != torch.float32:
        scores = torch.bmm(queries, turned, out_dtype=torch.float32)
    else:
        scores = torch.bmm(queries.float(), turned.float())
    weights = scores.mul_(scale).add_(bias).softmax(-1).to(q.dtype)
    return torch.bmm(weights, values).unflatten(0, (batch, heads))


def _causal_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The query heads that read one key head pass as rows of one head: over many rows the kernel
    is up to twice as fast. Its own triangle does not fit such rows, so a block of them brings a
    mask of the square at the end. What lies before the square is seen by all rows, and is joined
    to it by the two log-sum-exps."""
    batch, heads, rows, width = q.shape
    kv_heads, past = k.shape[1], k.shape[2] - rows
    group = heads // kv_heads
    grouped = q.unflatten(1, (kv_heads, group))
    own_keys, own_values = k[:, :, past:], v[:, :, past:]
    out = q.new_empty(batch, rows, kv_heads, group, width)
    placed = out.permute(0, 2, 3, 1, 4)
    masses = []
    for begin in range(0, rows, CAUSAL_ROWS):
        end = min(begin + CAUSAL_ROWS, rows)
        future = q.new_full((end - begin, end), float("-inf")).triu_(begin + 1)
        asked = grouped[:, :, :, begin:end].flatten(2, 3)
        keys, values, mask = own_keys[:, :, :end], own_values[:, :, :end], future.repeat(group, 1)
        own, mass = _flash_cpu(asked, keys, values, attn_mask=mask, scale=scale)
        placed[:, :, :, begin:end] = own.unflatten(2, (group, -1))
        masses.append(mass.unflatten(2, (group, -1)))
    if past:
        old, mass = _flash_cpu(grouped.flatten(2, 3), k[:, :, :past], v[:, :, :past], scale=scale)
        share = torch.sigmoid(mass.unflatten(2, (group, -1)) - torch.cat(masses, -1)).unsqueeze(-1)
        placed.copy_(torch.lerp(placed.float(), old.unflatten(2, (group, -1)).float(), share))
    return out.flatten(2, 3).transpose(1, 2)


def _causal_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """The kernels want equal numbers of heads. Key heads are not repeated: the members of a group
    become the batch, along which keys and values are views of stride 0. None: see `_fused_cuda`."""
    batch, heads, rows, width = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    if group == 1:
        return _fused_cuda(q, k, v, scale, causal=True)
    out = q.new_empty(batch, rows, kv_heads, group, width)
    for one, keys, values, place in zip(q, k, v, out, strict=True):
        members = one.unflatten(0, (kv_heads, group)).transpose(0, 1)
        keys, values = (each.expand(group, *each.shape) for each in (keys, values))
        result = _fused_cuda(members, keys, values, scale, causal=True)
        if result is None:
            return None
        place.copy_(result.permute(2, 1, 0, 3))
    return out.flatten(2, 3).transpose(1, 2)


def _fused_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> Tensor | None:
    """By one of torch's kernels that do not write the scores out; None where neither takes these
    inputs. Causal is lower-right, whatever the numbers of rows and keys.

    The kernel is named because `scaled_dot_product_attention` prefers cuDNN's on Hopper and some of
    Blackwell (since torch 2.10), which is built anew for every number of keys: 23 to 37 ms each
    (github.com/pytorch/pytorch/pull/162073).
    """
    inputs = SDPAParams(q, k, v, None, 0.0, False, False)
    out: Tensor
    # It pads other widths, but not when it is called by its name.
    if q.shape[-1] % 8 == 0 and can_use_flash_attention(inputs):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out = flash(q, k, v, 0.0, causal, False, scale=scale)[0]
        return out
    if not can_use_efficient_attention(inputs):
        return None
    turned = (each.transpose(1, 2) for each in (q, k, v))
    efficient = torch.ops.aten._efficient_attention_forward
    nothing = (None,) * 5  # bias, and what tells sequences of one batch apart
    out = efficient(*turned, *nothing, 0.0, _LOWER_RIGHT if causal else 0, scale=scale)[0]
    return out.transpose(1, 2)


@functools.cache
def _backend_has_attention() -> bool:
    """Whether the out-of-tree device (torch_npu) brings its own attention; without one, torch
    composes it from full score matrices."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        "aten::scaled_dot_product_attention", "PrivateUse1"
    )


def blockwise(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """`attention` with plain operations, for devices without a fused kernel. Holds at most
    `QUERY_BLOCK` x `KEY_BLOCK` scores per head at a time, in fp32."""
    kv_heads, rows = k.shape[1], q.shape[2]
    past = k.shape[2] - rows
    out = torch.empty_like(q)
    grouped, placed = (t.unflatten(1, (kv_heads, -1)) for t in (q, out))
    for begin in range(0, rows, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, rows)
        # Keys after this are in the future of the whole block.
        seen = past + end if causal else k.shape[2]
        first = past + begin if causal else None
        placed[:, :, :, begin:end] = _query_block(
            grouped[:, :, :, begin:end].float() * scale, k[:, :, :seen], v[:, :, :seen], first
        )
    return out


def _query_block(q: Tensor, k: Tensor, v: Tensor, first: int | None) -> Tensor:
    """Running softmax of fp32 queries [B, Hkv, G, rows, D] over all of `k`, `v` [B, Hkv, Tk, D].
    `first` is the index of the last key that row 0 sees, one more for each row; None: no mask."""
    rows = q.shape[3]
    step = min(QUERY_BLOCK * KEY_BLOCK // rows, LONGEST_KEY_BLOCK)
    folded = q.flatten(2, 3)
    best = folded.new_full((*folded.shape[:3], 1), float("-inf"))
    mass = torch.zeros_like(best)
    total = torch.zeros_like(folded)
    for begin in range(0, k.shape[2], step):
        end = min(begin + step, k.shape[2])
        scores = folded @ k[:, :, begin:end].float().transpose(2, 3)
        if first is not None and end > first + 1:
            index = torch.arange(first, first + rows, device=q.device)
            hidden = torch.arange(begin, end, device=q.device) > index[:, None]
            scores.unflatten(2, (-1, rows)).masked_fill_(hidden, float("-inf"))
        highest = torch.maximum(best, scores.amax(-1, keepdim=True))
        fade = torch.exp(best - highest)
        scores.sub_(highest).exp_()
        mass.mul_(fade).add_(scores.sum(-1, keepdim=True))
        total.mul_(fade).add_(scores @ v[:, :, begin:end].float())
        best = highest
    return total.div_(mass).unflatten(2, (-1, rows))
