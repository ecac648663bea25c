"""Tensors that are joined where they lie, so that an allocator has no holes to keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import simdevice as sim
import torch
from simdevice import simulated
from torch import Tensor

from lowvram import LowVRAMOmni, Result
from lowvram.offload.accelerator import FALLBACK_CONTEXT_BYTES
from lowvram.pocket import make_checkpoint
from lowvram.quant import QuantLinear, apply_all, join
from lowvram.quant.kernels import Kernel, reference, triton
from lowvram.quant.side_by_side import ALIGNMENT, side_by_side

BRAIN = torch.bfloat16


def in_one_block(tensors: list[Tensor], apart: int = 0) -> list[Tensor]:
    """Copies as the loader places them, each at a multiple of 512 bytes; `apart` bytes more."""
    places, at = [], 0
    for tensor in tensors:
        places.append(at)
        at += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT + apart
    block = torch.zeros(at, dtype=torch.uint8)
    return [
        block[place : place + one.nbytes].view(one.dtype).view(one.shape).copy_(one)
        for place, one in zip(places, tensors, strict=True)
    ]


def linears() -> list[list[Tensor]]:
    """Words, scales and a bias of three linears of 64 inputs."""
    drawn = torch.Generator().manual_seed(0)
    return [
        [
            torch.randint(-(2**31), 2**31, (64, n // 8), generator=drawn).int(),
            torch.rand(2, n, generator=drawn).half(),
            torch.rand(n, generator=drawn).to(BRAIN),
        ]
        for n in (72, 24, 8)
    ]


@pytest.mark.parametrize("apart", [0, ALIGNMENT])
def test_what_stands_alone_in_one_piece_stays_there(apart: int) -> None:
    given = linears()
    placed = in_one_block([tensor for one in given for tensor in one], apart)
    groups = [placed[i::3] for i in range(3)]
    wanted = [torch.cat([one[i] for one in given], dim=axis) for i, axis in enumerate((1, 1, 0))]
    memory = placed[0].untyped_storage()
    joined = side_by_side(groups, (1, 1, 0))
    for found, right in zip(joined, wanted, strict=True):
        assert torch.equal(found, right) and found.is_contiguous()
        inside = found.untyped_storage().data_ptr() == memory.data_ptr()
        assert inside == (apart == 0)
        assert found.data_ptr() % 16 == memory.data_ptr() % 16


def test_a_tensor_of_others_in_between_is_left_as_it_is() -> None:
    first, others, second = in_one_block(
        [torch.ones(128), torch.full((128,), 2.0), torch.ones(128)]
    )
    (joined,) = side_by_side([[first, second]], (0,))
    assert torch.equal(joined, torch.ones(256)) and (others == 2).all()
    assert joined.untyped_storage().data_ptr() != others.untyped_storage().data_ptr()


def test_memory_of_several_pieces_is_joined_in_new_memory() -> None:
    (joined,) = side_by_side([[torch.ones(4), torch.zeros(4)]], (0,))
    assert joined.tolist() == [1] * 4 + [0] * 4


def test_a_loaded_model_is_joined_where_it_lies(tmp_path: Path) -> None:
    """On a device with an allocator of its own: the same reply, in one block, as it is planned."""
    folder = make_checkpoint(tmp_path / "pocket", seed=6, awq=True)

    @simulated
    def inside() -> None:
        sim.configure(limit=8 << 30, context=FALLBACK_CONTEXT_BYTES)

        def reply() -> Result:
            options: Any = {"device": "npu", "dtype": "float32", "speech": False}
            with LowVRAMOmni.from_pretrained(folder, **options) as omni:
                words = [{"role": "user", "content": "Say something."}]
                return omni.generate(words, max_new_tokens=4)

        wanted, absorb, whole = reply(), QuantLinear.absorb, []

        def watched(self: QuantLinear, others: Sequence[QuantLinear]) -> None:
            absorb(self, others)
            held = self.get_buffer("qweight")
            whole.append(held.untyped_storage().nbytes() > 4 * held.nbytes)

        kernel = Kernel("triton", "", triton.prepare, reference.run, triton.JOINS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(QuantLinear, "choose", lambda self, device: kernel)
            patch.setattr(QuantLinear, "absorb", watched)
            found = reply()
        assert whole and all(whole)
        assert found.tokens == wanted.tokens and sim.races() == []
        for row in found.report.phases:
            assert row.measured_peak_bytes <= row.predicted_peak_bytes

    inside()


def test_linears_that_the_loader_placed_are_joined_in_their_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel("triton", "", triton.prepare, reference.run, triton.JOINS)
    monkeypatch.setattr(QuantLinear, "choose", lambda self, device: kernel)
    layers = [QuantLinear(128, n, True, 64, dtype=BRAIN) for n in (64, 16, 24)]
    drawn = torch.Generator().manual_seed(1)
    for layer in layers:
        for name, held in layer.named_buffers():
            random = torch.rand(held.shape, generator=drawn)
            layer.register_buffer(name, (random * 2**31).int() if "q" in name else random.to(held))
    x = torch.randn(3, 128, generator=drawn).to(BRAIN)
    wanted = [layer(x) for layer in layers]
    names = [(layer, name) for layer in layers for name, _ in layer.named_buffers()]
    placed = in_one_block([layer.get_buffer(name) for layer, name in names])
    for (layer, name), tensor in zip(names, placed, strict=True):
        layer.register_buffer(name, tensor)
    join(layers)
    for found, right in zip(apply_all(layers, x), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=8e-3, atol=1e-2)
    memory = {tensor.untyped_storage().data_ptr() for tensor in layers[0].buffers()}
    assert memory == {placed[0].untyped_storage().data_ptr()}
    assert not [tensor for other in layers[1:] for tensor in other.buffers()]
