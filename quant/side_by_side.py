"""Tensors joined to one, in the memory that they have where that is one piece."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .huge_pages import in_huge_pages

ALIGNMENT = 512
"""Bytes at whose multiples tensors begin that stand in one piece of memory."""


def side_by_side(groups: Sequence[Sequence[Tensor]], axes: Iterable[int]) -> list[Tensor]:
    """The tensors of each group as one, along the axis of the group.

    Where all of all groups stand in one piece of memory, with nothing between them, they do so
    afterwards as well, in other places; none of what was given can be used then. An allocator that
    keeps what it gave would keep the places of single ones, in which no joined one fits.
    """
    made = [_joined(group, axis) for group, axis in zip(groups, axes, strict=True)]
    memory = _piece([tensor for group in groups for tensor in group])
    if memory is None:
        return made
    at, placed = 0, []
    for tensor in made:
        view = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        placed.append(view.copy_(tensor))
        at += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return placed


def _joined(group: Sequence[Tensor], axis: int) -> Tensor:
    first = group[0]
    shape = list(first.shape)
    shape[axis] = sum(tensor.shape[axis] for tensor in group)
    return torch.cat(list(group), dim=axis, out=in_huge_pages(first.new_empty(shape)))


def _piece(tensors: Sequence[Tensor]) -> Tensor | None:
    """The memory of these tensors, uint8, if they are all of what is in it."""
    storage = tensors[0].untyped_storage()
    if any(t.untyped_storage().data_ptr() != storage.data_ptr() for t in tensors):
        return None
    if tensors[0].is_meta or not all(t.is_contiguous() for t in tensors):
        return None
    spans = sorted((t.storage_offset() * t.itemsize, t.nbytes) for t in tensors)
    gaps = (later - first - size for (first, size), (later, _) in pairwise(spans))
    if any(first % ALIGNMENT for first, _ in spans) or not all(0 <= g < ALIGNMENT for g in gaps):
        return None
    first, (last, size) = spans[0][0], spans[-1]
    whole = torch.empty(0, dtype=torch.uint8, device=tensors[0].device)
    return whole.set_(storage, first, (last + size - first,), (1,))
