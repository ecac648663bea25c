"""The converter of compressed-tensors (llm-compressor's and vLLM's format) reads AutoAWQ files."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from findings import GROUPS, expected, farthest, found, stored, text_folder
from torch import Tensor

PACKED = "weight_packed"


def main() -> None:
    for group in GROUPS:
        converter = AutoAWQConverter.from_pretrained(text_folder(group))
        scheme = converter._build_quant_config().config_groups["config_group_0"]
        tensors = converter.process(stored(group))
        theirs: dict[str, Tensor] = {}
        for name in tensors:
            linear, _, kind = name.rpartition(".")
            if kind == PACKED:
                own = {
                    n.rpartition(".")[2]: t
                    for n, t in tensors.items()
                    if n.startswith(f"{linear}.")
                }
                made = PackedQuantizationCompressor.decompress(own, scheme)
                theirs[f"{linear}.weight"] = made["weight"].to(torch.float16)
        true = expected(group)
        ours = {name: true[name].half() for name in true if name.endswith(".weight")}
        found(f"weights after AutoAWQConverter, g{group}", farthest(ours, theirs), 0.0)


if __name__ == "__main__":
    main()
