"""4-bit linears through the loader: read as stored, turned once, dropped and read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowvram.models.layers import GatedMLP
from lowvram.offload import Loader, Meter, Part, Placement, Store, open_device
from lowvram.pocket import make_checkpoint
from lowvram.quant import KernelName, QuantLinear, linear_bytes, loading_bytes

LAYER = "thinker.model.layers.2."
LINEARS = {
    "self_attn.k_proj": (256, 64, True),
    "self_attn.o_proj": (256, 256, False),
    "mlp.down_proj": (512, 256, False),
}


def build(dtype: torch.dtype) -> nn.Module:
    root = nn.ModuleDict({"self_attn": nn.ModuleDict(), "mlp": nn.ModuleDict()})
    for path, (inputs, outputs, bias) in LINEARS.items():
        room, name = path.split(".")
        branch = root[room]
        assert isinstance(branch, nn.ModuleDict)
        branch[name] = QuantLinear(inputs, outputs, bias, 128, dtype=dtype)
    return root


@pytest.mark.parametrize(
    ("dtype", "kernel", "bound"),
    [(torch.float32, "reference", 1e-6), (torch.bfloat16, "cpu", 6e-3)],
    ids=str,
)
def test_load_drop_and_load_again(
    tmp_path: Path, dtype: torch.dtype, kernel: KernelName, bound: float
) -> None:
    folder = make_checkpoint(tmp_path / "awq", awq=True, speech=False)
    twin = load_file(
        make_checkpoint(tmp_path / "twin", awq="dequantized", speech=False) / "model.safetensors"
    )
    x = {inputs: torch.randn(3, inputs).to(dtype) for inputs in (256, 512)}

    def results(module: nn.Module) -> dict[str, Tensor]:
        found = {}
        for path, (inputs, _, _) in LINEARS.items():
            linear = module.get_submodule(path)
            assert isinstance(linear, QuantLinear) and linear.kernel.name == kernel
            found[path] = linear(x[inputs])
        return found

    device = open_device("cpu")
    meter = Meter(device)
    with Store.open(folder) as store:
        loader = Loader(store, device, meter, [Part("layer", LAYER, lambda: build(dtype), dtype)])
        first = results(loader.load("layer"))
        for path, out in first.items():
            weight, bias = twin[f"{LAYER}{path}.weight"], twin.get(f"{LAYER}{path}.bias")
            inputs = LINEARS[path][0]
            exact = F.linear(x[inputs].float(), weight, None if bias is None else bias.float())
            assert (out.float() - exact).norm() / exact.norm() < bound, path
        size = 2 if dtype == torch.bfloat16 else 4
        held = sum(linear_bytes(i, o, 128, kernel) for i, o, _ in LINEARS.values()) + 64 * size
        module = loader.load("layer")
        assert sum(buffer.nbytes for buffer in module.buffers()) == held
        loader.drop("layer")
        assert {buffer.device.type for buffer in module.buffers()} == {"meta"}
        assert loader.nbytes("layer") == sum(
            linear_bytes(i, o, 128) for i, o, _ in LINEARS.values()
        ) + (64 * size)
        again = results(loader.load("layer"))
        assert all(torch.equal(first[path], again[path]) for path in LINEARS)


@pytest.mark.parametrize("switch", ["0", "1"])
def test_linears_that_are_joined_take_what_is_planned(
    switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that is gone already counts: members are turned, and counted, before they join."""
    monkeypatch.setenv("LOWVRAM_NATIVE", switch)
    width, hidden, group = 256, 1024, 64

    def linear(name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
        return QuantLinear(inputs, outputs, bias, group, dtype=torch.bfloat16)

    def mlp() -> nn.Module:
        return GatedMLP(width, hidden, linear, "mlp", bias=False)

    tensors = {f"mlp.{name}": torch.zeros_like(each) for name, each in mlp().named_buffers()}
    save_file(tensors, tmp_path / "model.safetensors")
    device = open_device("cpu")
    meter = Meter(device)
    with Store.open(tmp_path) as store:
        loader = Loader(store, device, meter, [Part("mlp", "mlp.", mlp, torch.bfloat16)])
        with meter.phase("load"):
            module = loader.load("mlp")
    gate = module.get_submodule("gate_proj")
    assert isinstance(gate, QuantLinear)
    kernel = gate.kernel.name
    assert gate.joined == (hidden, hidden)
    held = sum(meter.held().values())
    shapes = [(width, 2 * hidden), (hidden, width)]
    # What is planned would do for the kernel that takes the place of this one as well.
    law = linear_bytes if kernel == "native" else loading_bytes
    most = max(law(*shape, group, kernel) for shape in shapes)
    assert held < meter.phases[0].peak_bytes <= held + most


def test_a_prepared_linear_streams_as_stored_after_a_drop(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "awq", awq=True, speech=False)
    device = open_device("cpu")

    def linears(module: nn.Module) -> list[nn.Module]:
        return [module.get_submodule(path) for path in LINEARS]

    part = Part("layer", LAYER, lambda: build(torch.bfloat16), torch.bfloat16, linears)
    x = torch.randn(3, 256).to(torch.bfloat16)
    with Store.open(folder) as store:
        loader = Loader(store, device, Meter(device), [part])
        linear = loader.load("layer").get_submodule("self_attn.k_proj")
        assert isinstance(linear, QuantLinear)
        assert linear.kernel.name == "cpu" and "qweight" not in linear._buffers
        prepared = linear(x)
        placement = Placement(streamed=(0, 1, 2), slabs=2, slab_bytes=1 << 20)
        loader.load("layer", placement)
        assert linear.kernel.name == "reference" and linear.joined == ()
        with loader.stream("layer").unit(0):
            out = linear(x)
        loader.close()
    assert (out - prepared).float().norm() / prepared.float().norm() < 6e-3
