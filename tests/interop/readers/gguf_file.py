"""The `gguf` package reads the file that `bench decode` makes for llama.cpp."""

from __future__ import annotations

import numpy as np
from findings import WORK, found
from gguf import GGUFReader
from gguf.quants import dequantize

LARGEST = 0.02


def main() -> None:
    reader = GGUFReader(WORK / "random.gguf")
    names = {tensor.name for tensor in reader.tensors}
    layers = reader.get_field("qwen2.block_count").contents()
    found("tensors of random.gguf missing", abs(len(names) - (12 * layers + 3)), 0.0)
    width = reader.get_field("qwen2.embedding_length").contents()
    words = reader.get_field("qwen2.vocab_size").contents()
    off = outside = 0.0
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name in ("token_embd.weight", "output.weight"):
            off += values.shape != (words, width)
        if values.ndim == 2:
            # Whole-numbered steps of a float16: the largest is one step past 0.02.
            outside = max(outside, float(np.abs(values).max()) / LARGEST - 1)
            off += not 0.5 < values.std() / (LARGEST / 3**0.5) < 1.5
        else:
            off += set(np.unique(values)) != {0.0 if tensor.name.endswith("bias") else 1.0}
    found("tensors of random.gguf with other shapes or values", off, 0.0)
    found("weights of random.gguf above 0.02, as a share of it", outside, 0.01)


if __name__ == "__main__":
    main()
