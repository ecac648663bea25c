"""GPTQModel's loader, and transformers' own, which runs AWQ by GPTQModel's linears."""

from __future__ import annotations

import os

# With two cores or fewer it wants more workers than it allows itself.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
import transformers
from findings import (
    BFLOAT16,
    FLOAT16,
    GROUPS,
    LINEARS,
    compare_logits,
    found,
    omni_folder,
    stand_in,
    text_folder,
)
from torch import nn

stand_in("datasets")

from gptqmodel import BACKEND, GPTQModel  # noqa: E402


class ThinkerOf(nn.Module):
    """A whole Omni's answer to token ids."""

    def __init__(self, omni: nn.Module) -> None:
        super().__init__()
        self.thinker = omni.thinker

    def forward(self, tokens: torch.Tensor) -> object:
        return self.thinker(input_ids=tokens)


def main() -> None:
    for group in GROUPS:
        loaded = GPTQModel.load(
            text_folder(group), backend=BACKEND.TORCH, device="cpu", dtype=torch.bfloat16
        )
        compare_logits("logits of GPTQModel.load, bfloat16", loaded.model, group, BFLOAT16)
        text = transformers.AutoModelForCausalLM.from_pretrained(
            text_folder(group), dtype=torch.float16
        )
        compare_logits("logits of transformers' AwqConfig loader, float16", text, group, FLOAT16)
        whole = transformers.Qwen2_5OmniForConditionalGeneration.from_pretrained(
            omni_folder(group), dtype=torch.bfloat16
        )
        packed = [n for n, m in whole.named_modules() if "awq" in type(m).__name__.lower()]
        wrong = [n for n in packed if not n.startswith("thinker.") or ".layers." not in n]
        off = abs(len(packed) - LINEARS) + len(wrong)
        found(f"linears of the whole Omni packed otherwise, g{group}", off, 0.0)
        compare_logits(
            "logits of the whole Omni by transformers, bfloat16", ThinkerOf(whole), group, BFLOAT16
        )


if __name__ == "__main__":
    main()
