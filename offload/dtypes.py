"""Which type weights are computed in."""

from __future__ import annotations

import torch

DtypeChoice = tuple[torch.dtype, str]
"""A type and the reason for it, as the plan prints it."""


def as_stored(stored: torch.dtype) -> DtypeChoice:
    """The stored type where models are computed in it, else bfloat16."""
    if stored in (torch.float32, torch.bfloat16, torch.float16):
        return stored, "as stored"
    return torch.bfloat16, f"stored as {str(stored).removeprefix('torch.')}, not for computing"
