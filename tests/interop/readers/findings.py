"""How a reader's script says what it found: one JSON line a comparison, in the file it is given.

Runs in environments of other people's packages, so it needs torch and nothing of this project.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

GROUPS = (128, 64, 32)
LINEARS = 28
"""Packed linears of the built-in model's text layers."""

FLOAT32, FLOAT16, BFLOAT16 = 1e-5, 3e-3, 2e-2
"""How far logits may be from those in float32, as a share; rounding to four bits is over 0.1."""

WORK, OUT = Path(sys.argv[1]), Path(sys.argv[2])


def found(what: str, difference: float, limit: float) -> None:
    """`difference` is judged against `limit`, that one included."""
    line = {"what": what, "difference": float(difference), "limit": limit}
    with OUT.open("a") as file:
        file.write(json.dumps(line) + "\n")


def text_folder(group: int) -> str:
    return str(WORK / f"text-g{group}")


def omni_folder(group: int) -> str:
    return str(WORK / f"omni-g{group}")


def stored(group: int) -> dict[str, Tensor]:
    """The text model's tensors as they lie in the file."""
    return load_file(WORK / f"text-g{group}" / "model.safetensors")


def expected(group: int) -> dict[str, Tensor]:
    return load_file(WORK / f"expected-g{group}.safetensors")


def compare_logits(what: str, model: nn.Module, group: int, limit: float) -> None:
    """A model that takes token ids, as transformers' do."""
    true = expected(group)
    with torch.inference_mode():
        out = model(true["tokens"][None]).logits[0].float()
    found(f"{what}, g{group}", share(out, true["logits"]), limit)


class ThinkerOf(nn.Module):
    """A whole Omni's answer to token ids."""

    def __init__(self, omni: nn.Module) -> None:
        super().__init__()
        self.thinker = omni.thinker

    def forward(self, tokens: Tensor) -> object:
        return self.thinker(input_ids=tokens)


def check_omni(loader: str, omni: nn.Module, group: int, limit: float) -> None:
    """All linears of the text layers are packed, nothing else is, and the logits are right."""
    packed = [n for n, m in omni.named_modules() if hasattr(m, "qweight")]
    wrong = [n for n in packed if not n.startswith("thinker.model.") or ".layers." not in n]
    off = abs(len(packed) - LINEARS) + len(wrong)
    found(f"linears of the whole Omni packed otherwise, {loader}, g{group}", off, 0.0)
    compare_logits(f"logits of the whole Omni, {loader}", ThinkerOf(omni), group, limit)


def share(out: Tensor, true: Tensor) -> float:
    """How far `out` is from `true`, as a share of it."""
    return float((out - true).norm() / true.norm())


def farthest(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference of two sets of tensors with the same names; infinite without."""
    if not ours or ours.keys() != theirs.keys():
        return float("inf")
    apart = [(ours[n].double() - theirs[n].double()).abs().max() for n in ours]
    return float(torch.stack(apart).max())


class StandIn(ModuleType):
    """A module in place of a large one that is imported and not used: whatever is asked of it is
    there, and is `object`."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def stand_in(name: str) -> None:
    # It asks for the versions of what it sees, so it looks first.
    import transformers  # noqa: F401

    module = StandIn(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__version__ = "0"  # type: ignore[attr-defined]
    sys.modules[name] = module
