"""The AWQ "GEMM" layout on disk, and its canonical form.

Canonical: `q` uint8 [K, N] in 0..15, `zeros` uint8 [K/g, N] in 0..15, `scales` [K/g, N], for a
linear with K inputs, N outputs and groups of g inputs. A weight is `(q - zero) * scale`.

On disk each int32 holds eight consecutive outputs of one input row: nibble i (bits 4i to 4i+3)
holds output `8c + ORDER[i]` of column c. Zero points are stored as they are. Source: the files
AutoAWQ writes with version "gemm". Imports numpy only; the same on a device is in `kernels`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs nibble i holds."""

NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)
"""The inverse: which nibble holds output j."""

GROUPS = (32, 64, 128)
"""Group sizes that are read."""


class Packed(NamedTuple):
    """One linear as stored: int32 [K, N/8], int32 [K/g, N/8], float16 [K/g, N]."""

    qweight: Array
    qzeros: Array
    scales: Array


def pack(values: Array) -> Array:
    """Integers 0..15 [R, N], N a multiple of 8 -> int32 [R, N/8]."""
    rows, columns = values.shape
    eights = values.reshape(rows, columns // 8, 8)[..., ORDER].astype(np.uint32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return np.bitwise_or.reduce(eights << shifts, axis=-1).view(np.int32)


def unpack(packed: Array) -> Array:
    """int32 [R, N/8] -> uint8 [R, N]."""
    rows, columns = packed.shape
    shifts = np.array([4 * nibble for nibble in NIBBLE_OF], dtype=np.uint32)
    eights = (np.ascontiguousarray(packed).view(np.uint32)[..., None] >> shifts) & 0xF
    return eights.reshape(rows, columns * 8).astype(np.uint8)


def dequantize(qweight: Array, qzeros: Array, scales: Array, group: int) -> Array:
    """Stored tensors -> float32 weights [K, N] (inputs first, as stored)."""
    q = unpack(qweight).astype(np.float32)
    zeros = np.repeat(unpack(qzeros).astype(np.float32), group, axis=0)
    return (q - zeros) * np.repeat(scales.astype(np.float32), group, axis=0)


def quantize(weight: Array, group: int) -> Packed:
    """Round-to-nearest float weights [N, K] (as a linear keeps them) into the stored layout.

    The step of a group is a fifteenth of its range, at least 1e-5/15, rounded to float16 first so
    that the integers are the nearest ones for the step that is stored.
    """
    columns = weight.astype(np.float32).T
    inputs, outputs = columns.shape
    grouped = columns.reshape(inputs // group, group, outputs)
    low, high = grouped.min(axis=1), grouped.max(axis=1)
    scales = (np.maximum(high - low, 1e-5) / 15).astype(np.float16)
    step = scales.astype(np.float32)
    zeros = np.clip(-np.round(low / step), 0, 15)
    q = np.clip(np.round(grouped / step[:, None]) + zeros[:, None], 0, 15)
    return Packed(
        pack(q.reshape(inputs, outputs).astype(np.uint8)), pack(zeros.astype(np.uint8)), scales
    )
