"""auto-round's own CPU linear behind transformers' loader."""

from __future__ import annotations

import torch
import transformers
from findings import FLOAT32, GROUPS, compare_logits, stand_in, text_folder

stand_in("datasets")


def main() -> None:
    for group in GROUPS:
        chosen = transformers.AutoRoundConfig(backend="ark")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            text_folder(group), dtype=torch.float32, device_map="cpu", quantization_config=chosen
        )
        compare_logits("logits of auto-round's linears, float32", model, group, FLOAT32)


if __name__ == "__main__":
    main()
