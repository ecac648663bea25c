"""GPTQModel's own GPTQ on one linear, against the compensation here: the error on unseen tokens.

Both begin with the whole range of each group, know the same tokens and damp as they usually do.
Theirs keeps the order of the file, or what it has for that (`act_group_aware`), or orders all
inputs (`desc_act`), which an AWQ file cannot hold.
"""

from __future__ import annotations

import os

# With two cores or fewer it wants more workers than it allows itself.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from findings import found, stand_in
from torch import Tensor, nn

from lowvram.quant.gptq import Compensation
from lowvram.quant.gptq_inputs import Products
from lowvram.quant.search_grid import full_range

stand_in("datasets")

from gptqmodel.quantization import QuantizeConfig  # noqa: E402
from gptqmodel.quantization.gptq import GPTQ  # noqa: E402

OUTPUTS, INPUTS, TOKENS = 256, 512, 4096
ORDERS = {
    "in the file's order": {"desc_act": False, "act_group_aware": False},
    "act_group_aware": {"desc_act": False, "act_group_aware": True},
    "desc_act": {"desc_act": True, "act_group_aware": False},
}


def inputs(seed: int) -> Tensor:
    """Correlated tokens [T, K], channels of different size, with some noise of their own."""
    torch.manual_seed(1)
    size = torch.exp(0.8 * torch.randn(INPUTS))
    mix = torch.randn(INPUTS // 4, INPUTS) * size / (INPUTS // 4) ** 0.5
    torch.manual_seed(seed)
    return torch.randn(TOKENS, len(mix)) @ mix + 0.3 * size * torch.randn(TOKENS, INPUTS)


def theirs(weight: Tensor, x: Tensor, group: int, order: dict[str, bool]) -> Tensor:
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data = weight.clone()
    config = QuantizeConfig(bits=4, group_size=group, sym=False, **order)
    search = GPTQ(linear, config)
    search.quantizer.configure(perchannel=True)
    search.add_batch(x[None], linear(x)[None])
    quantized: Tensor = search.quantize()[0]
    return quantized.float()


def ours(weight: Tensor, x: Tensor, group: int) -> Tensor:
    products = Products((x.T @ x / len(x),), None)
    return Compensation(products).code(weight.clone(), full_range(weight, group)).dense()


def check(group: int) -> None:
    torch.manual_seed(group)
    weight = torch.randn(OUTPUTS, INPUTS)
    x, unseen = inputs(2), inputs(3)

    def error(packed: Tensor) -> float:
        return float(((packed - weight) @ unseen.T).square().sum())

    mine = error(ours(weight, x, group))
    for name, order in ORDERS.items():
        share = mine / error(theirs(weight, x, group, order))
        found(f"held-out error of compensation, of its GPTQ's {name}, g{group}", share, 1.0)


@torch.no_grad()
def main() -> None:
    for group in (128, 32):
        check(group)


if __name__ == "__main__":
    main()
