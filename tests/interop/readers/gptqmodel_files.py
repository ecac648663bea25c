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
    check_omni,
    compare_logits,
    omni_folder,
    stand_in,
    text_folder,
)

stand_in("datasets")

from gptqmodel import BACKEND, GPTQModel  # noqa: E402


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
        check_omni("transformers, bfloat16", whole, group, BFLOAT16)


if __name__ == "__main__":
    main()
