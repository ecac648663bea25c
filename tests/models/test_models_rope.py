"""Rotary tables against those of transformers, and the rotation against its definition."""

from __future__ import annotations

import pytest
import torch
from thinker_oracle import assert_close, oracle
from torch import Tensor

from lowvram.models.rope import Rope, axial, inverse_frequencies, mrope, rotate

VARIANTS = [(4, 6, 6), (8, 8, 0)]


def unsigned(rope: Rope) -> tuple[Tensor, Tensor]:
    """Our tables without the head axis and without the sign: as transformers keeps them."""
    cos, sin = (table.squeeze(-2) for table in rope)
    half = sin.shape[-1] // 2
    return cos, torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)


@pytest.mark.oracle
@pytest.mark.parametrize("sections", VARIANTS)
def test_three_axes(sections: tuple[int, int, int]) -> None:
    truth = oracle(0, mrope_section=sections)
    config = truth.config.thinker.text
    assert config.mrope_section == sections
    positions = torch.randint(0, 32768, (3, 2, 50), generator=torch.Generator().manual_seed(0))
    ours = unsigned(mrope(positions, sections, config.head_dim, config.rope_theta))
    theirs = truth.find("Qwen2_5OmniThinkerTextModel").rotary_emb(torch.zeros(1), positions)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.oracle
def test_rows_and_columns() -> None:
    truth = oracle(0)
    config = truth.config.thinker.vision
    rows, columns = torch.randint(0, 200, (2, 90), generator=torch.Generator().manual_seed(1))
    ours = unsigned(axial(rows, columns, config.hidden_size // config.num_heads))
    places = torch.stack((rows, columns), dim=-1)
    theirs = truth.find("Qwen2_5OmniVisionRotaryEmbedding")(torch.zeros(1), places)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_rotation_by_its_definition() -> None:
    """Value i and value i + half are the two parts of a complex number, turned by the angle."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 7, 3, 16, generator=generator)
    positions = torch.arange(14).view(1, 2, 7).expand(3, 2, 7)
    angles = positions[0][..., None] * inverse_frequencies(16, 10_000.0)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones(()), angles)[:, :, None]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    assert_close(rotate(x, mrope(positions, (2, 3, 3), 16, 10_000.0)), expected, 1e-6)


def test_wider_tables_widen_the_work_and_not_the_result() -> None:
    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    rope = axial(torch.arange(5), torch.arange(5), 8)
    assert torch.equal(rotate(x, rope), rotate(x.float(), rope).bfloat16())


def test_tables_stay_on_the_host_whatever_the_default_device() -> None:
    positions = torch.zeros(3, 1, 4, dtype=torch.long)
    with torch.device("meta"):
        rope = mrope(positions, (2, 3, 3), 16, 10_000.0)
    assert [table.device.type for table in rope] == ["cpu", "cpu"]
