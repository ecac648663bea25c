"""Writes autoawq.safetensors: small linears packed by AutoAWQ 0.2.9 itself.

Run it where `autoawq==0.2.9` is installed (it needs no accelerator and no triton):

    python tests/quant/data/make_vectors.py

The package's two files that are wanted are loaded without the rest of it, which wants libraries
that are of no use here. For each case the file holds the weights and bias that went in, what
`WQLinear_GEMM.from_linear` stored, and what the package's `dequantize_gemm` makes of that.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

CASES = {"g32": (64, 32, 32), "g64": (64, 32, 64), "g128": (128, 32, 128)}
"""Name -> inputs, outputs, group size."""


def autoawq() -> tuple[type, type, object]:
    """`AwqQuantizer`, `WQLinear_GEMM` and `dequantize_gemm`, without the packages around them."""
    found = importlib.util.find_spec("awq")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("autoawq is not installed; try: pip install --no-deps autoawq==0.2.9")
    root = Path(next(iter(found.submodule_search_locations)))
    for name in ("awq", "awq.modules", "awq.quantize", "awq.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.parent.joinpath(*name.split(".")))]
        sys.modules[name] = package
    if importlib.util.find_spec("datasets") is None:
        absent = types.ModuleType("datasets")
        absent.load_dataset = None  # type: ignore[attr-defined]
        sys.modules["datasets"] = absent
    quantizer = importlib.import_module("awq.quantize.quantizer")
    packing = importlib.import_module("awq.utils.packing_utils")
    return quantizer.AwqQuantizer, quantizer.WQLinear_GEMM, packing.dequantize_gemm


def main() -> None:
    quantizer, packed_linear, dequantize = autoawq()
    torch.manual_seed(20)
    tensors: dict[str, torch.Tensor] = {}
    for case, (inputs, outputs, group) in CASES.items():
        linear = nn.Linear(inputs, outputs).half()
        linear.weight.data[0] = 0
        linear.weight.data[1, 3] = 40
        linear.weight.data[2].abs_().add_(0.01)
        tensors[f"{case}.weight"] = linear.weight.data.clone()
        options = types.SimpleNamespace(w_bit=4, group_size=group, zero_point=True)
        on_grid, scales, zeros = quantizer.pseudo_quantize_tensor(options, linear.weight.data)
        linear.weight.data = on_grid
        steps = (scales.T.contiguous(), zeros.T.contiguous())
        made = packed_linear.from_linear(linear, 4, group, False, *steps)
        tensors |= {f"{case}.{name}": t.clone() for name, t in made.state_dict().items()}
        tensors[f"{case}.dense"] = dequantize(made.qweight, made.qzeros, made.scales, 4, group)
    metadata = {"autoawq": importlib.metadata.version("autoawq"), "format": "pt"}
    save_file(tensors, Path(__file__).with_name("autoawq.safetensors"), metadata)


if __name__ == "__main__":
    main()
