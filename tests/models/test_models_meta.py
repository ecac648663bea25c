"""The parts at their true shapes on `meta`: nothing is computed, nothing is looked at."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from allocations import Allocations
from torch import Tensor, nn

from lowvram.config import DecoderConfig, OmniConfig
from lowvram.models import AudioTower, KVCache, Talker, ThinkerText, VisionTower, dense
from lowvram.specs import SPECS
from lowvram.tensors import expected_tensors

NAMES = ["Qwen2.5-Omni-3B", "Qwen2.5-Omni-7B"]
HOST_ONLY = "thinker.model.embed_tokens.weight"

pytestmark = pytest.mark.parametrize("name", NAMES)


def few_layers(name: str) -> OmniConfig:
    """The published shapes with two layers of each kind."""
    config = SPECS[name].config
    thinker, talker = config.thinker, config.talker
    assert talker is not None
    text = dataclasses.replace(thinker.text, num_hidden_layers=2)
    return dataclasses.replace(
        config,
        thinker=dataclasses.replace(
            thinker,
            text=text,
            vision=dataclasses.replace(thinker.vision, depth=2, fullatt_block_indexes=(1,)),
            audio=dataclasses.replace(thinker.audio, encoder_layers=2),
        ),
        talker=dataclasses.replace(
            talker, decoder=dataclasses.replace(talker.decoder, num_hidden_layers=2)
        ),
    )


def on_meta(build: Any) -> Any:
    with torch.device("meta"):
        return build().bfloat16()


def cache_for(config: DecoderConfig, tokens: int) -> KVCache:
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    return KVCache(layers, 1, heads, tokens, config.head_dim, torch.bfloat16, "meta")


def empty(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def parts(config: OmniConfig) -> dict[str, nn.Module]:
    thinker, talker = config.thinker, config.talker
    assert talker is not None
    return {
        "thinker.": on_meta(lambda: ThinkerText(thinker, dense)),
        "thinker.visual.": on_meta(lambda: VisionTower(thinker.vision)),
        "thinker.audio_tower.": on_meta(lambda: AudioTower(thinker.audio)),
        "talker.": on_meta(lambda: Talker(talker)),
    }


def test_names_and_shapes_are_those_of_the_checkpoint(name: str) -> None:
    config = SPECS[name].config
    ours = {
        prefix + tensor: tuple(value.shape)
        for prefix, module in parts(config).items()
        for tensor, value in module.state_dict().items()
    }
    published = {
        tensor: shape
        for tensor, shape in expected_tensors(config, lambda linear: False).items()
        if not tensor.startswith("token2wav.") and tensor != HOST_ONLY
    }
    assert ours == published


@torch.no_grad()
def test_prefill_and_decode(name: str) -> None:
    config = few_layers(name).thinker
    text = on_meta(lambda: ThinkerText(config, dense))
    cache = cache_for(config.text, 4000)
    width, tokens = config.text.hidden_size, 2000
    with Allocations("meta") as made:
        for start, count in ((0, tokens), (tokens, tokens - 1), (2 * tokens - 1, 1)):
            positions = torch.arange(start, start + count).expand(3, 1, count)
            rope = text.model.rope(positions, torch.bfloat16)
            hidden = text.model(empty(1, count, width), rope, cache, start)
            assert hidden.shape == (1, count, width)
    # Gate and up of each layer are the largest; their product takes the place of the gate.
    wide = 2 * tokens * config.text.intermediate_size
    assert max(made.sizes) == wide
    assert made.sizes.count(wide) == 2 * config.text.num_hidden_layers
    logits = text.logits(hidden[:, -1])
    assert (logits.shape, logits.dtype) == ((1, config.text.vocab_size), torch.float32)


@torch.no_grad()
def test_talker(name: str) -> None:
    config = few_layers(name).talker
    assert config is not None
    talker = on_meta(lambda: Talker(config))
    cache = cache_for(config.decoder, 300)
    x = torch.cat([talker.embed(torch.zeros(1, 2, dtype=torch.long, device="meta"))] * 100, dim=1)
    assert x.shape == (1, 200, config.embedding_size)
    rope = talker.rope(torch.zeros(3, 1, 200, dtype=torch.long, device="meta"), x.dtype)
    hidden = talker(x, rope, cache, 0)
    assert talker.logits(hidden[:, -1]).shape == (1, config.decoder.vocab_size)


@torch.no_grad()
def test_towers(name: str) -> None:
    config = few_layers(name).thinker
    vision = on_meta(lambda: VisionTower(config.vision))
    with Allocations("meta") as made:
        cells = vision(empty(54 * 54, config.vision.patch_values), 54, 54)
    assert cells.shape == (27 * 27, config.text.hidden_size)
    assert max(made.sizes) == 2 * 54 * 54 * config.vision.intermediate_size
    audio = on_meta(lambda: AudioTower(config.audio))
    assert audio(empty(config.audio.num_mel_bins, 200)).shape == (50, config.text.hidden_size)
