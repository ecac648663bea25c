"""AutoAWQ reads and packs what we packed: its de-quantizer, its linear, its loader."""

from __future__ import annotations

import torch
from findings import (
    FLOAT16,
    GROUPS,
    check_omni,
    compare_logits,
    expected,
    farthest,
    found,
    omni_folder,
    stand_in,
    stored,
    text_folder,
)
from torch import Tensor, nn

stand_in("datasets")

from awq import AutoAWQForCausalLM  # noqa: E402
from awq.models import base  # noqa: E402
from awq.modules.linear.gemm import WQLinear_GEMM  # noqa: E402
from awq.utils.packing_utils import dequantize_gemm, reverse_awq_order, unpack_awq  # noqa: E402


def linears(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]


def dense(tensors: dict[str, Tensor], linear: str, group: int) -> Tensor:
    """Its float16 weights [K, N]."""
    kinds = ("qweight", "qzeros", "scales")
    return dequantize_gemm(*(tensors[f"{linear}.{kind}"] for kind in kinds), 4, group)


def repacked(
    tensors: dict[str, Tensor], linear: str, weight: Tensor, group: int
) -> dict[str, Tensor]:
    """What its linear stores of float16 weights [N, K] that lie on our grid."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False).half()
    made.weight.data = weight
    packed_zeros = tensors[f"{linear}.qzeros"]
    zeros = reverse_awq_order(*unpack_awq(packed_zeros, packed_zeros, 4), 4)[1] & 15
    scales = tensors[f"{linear}.scales"]
    packed = WQLinear_GEMM.from_linear(made, 4, group, False, scales, zeros.half())
    return {f"{linear}.{name}": t for name, t in packed.state_dict().items()}


def load(folder: str) -> nn.Module:
    options = {"fuse_layers": False, "device_map": {"": "cpu"}, "torch_dtype": torch.float16}
    return AutoAWQForCausalLM.from_quantized(folder, **options).model


def main() -> None:
    # Its loader refuses a CPU without an Intel extension that is no longer made.
    base.get_best_device = lambda: "cuda:0"
    for group in GROUPS:
        tensors, true = stored(group), expected(group)
        names = linears(tensors)
        theirs = {f"{name}.weight": dense(tensors, name, group).T for name in names}
        ours = {name: true[name].half() for name in theirs}
        found(f"dequantize_gemm, g{group}", farthest(ours, theirs), 0.0)
        again: dict[str, Tensor] = {}
        for name in names:
            again |= repacked(tensors, name, ours[f"{name}.weight"], group)
        kept = {name: tensors[name] for name in again if name in tensors}
        found(f"WQLinear_GEMM packs the same bits, g{group}", farthest(kept, again), 0.0)
        compare_logits("logits of its loader, float16", load(text_folder(group)), group, FLOAT16)
        check_omni("its loader, float16", load(omni_folder(group)), group, FLOAT16)


if __name__ == "__main__":
    main()
