"""The text decoder against Qwen2_5OmniThinkerTextModel, and its chunks against the whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from thinker_oracle import Oracle, assert_close, loaded, oracle
from torch import Tensor, nn

from lowvram.config import DecoderConfig
from lowvram.models import Decoder, KVCache, ThinkerText, dense

TOKENS = 41
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 4},
    # The 3B Talker, too, has sections for two axes only.
    {"num_key_value_heads": 1, "mrope_section": (8, 8, 0)},
]
EMBEDDING = ("thinker.model.embed_tokens.weight",)

pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def text_of(truth: Oracle) -> ThinkerText:
    kept = {
        name: tensor
        for name, tensor in truth.part("thinker.", EMBEDDING).items()
        if not name.startswith(("visual.", "audio_tower."))
    }
    return loaded(lambda: ThinkerText(truth.config.thinker, dense), kept)


def cache_for(config: DecoderConfig, batch: int = 1, dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache(
        config.num_hidden_layers,
        batch,
        config.num_key_value_heads,
        TOKENS + 3,
        config.head_dim,
        dtype,
        "cpu",
    )
    cache.data.fill_(float("nan"))
    return cache


def sample(config: DecoderConfig, seed: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Embeddings, and positions whose three axes wander apart as those of a video do."""
    generator = torch.Generator().manual_seed(100 + seed)
    x = torch.randn(batch, TOKENS, config.hidden_size, generator=generator)
    steps = torch.randint(-20, 60, (3, batch, TOKENS), generator=generator)
    return x, steps.cumsum(-1).abs()


def run(decoder: Decoder, x: Tensor, positions: Tensor, sizes: list[int]) -> Tensor:
    """The decoder over consecutive chunks of these sizes."""
    cache = cache_for(decoder.config, len(x), x.dtype)
    done, parts = 0, []
    for size in sizes:
        stop = done + size
        rope = decoder.rope(positions[..., done:stop], x.dtype)
        parts.append(decoder(x[:, done:stop], rope, cache, done))
        done = stop
    return torch.cat(parts, dim=1)


@pytest.mark.oracle
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_hidden_states_after_every_layer(seed: int, variant: dict[str, Any]) -> None:
    truth = oracle(seed, **variant)
    decoder = text_of(truth).model
    x, positions = sample(decoder.config, seed, batch=2)
    theirs = truth.find("Qwen2_5OmniThinkerTextModel")(
        inputs_embeds=x, position_ids=positions, use_cache=False, output_hidden_states=True
    )
    before = x.clone()
    cache = cache_for(decoder.config, batch=2)
    rope = decoder.rope(positions, x.dtype)
    ours = x
    for layer, expected in zip(decoder.layers[:-1], theirs.hidden_states[1:-1], strict=True):
        ours = layer(ours, rope, cache, 0)
        assert_close(ours, expected)
    final = decoder(x, rope, cache_for(decoder.config, batch=2), 0)
    assert_close(final, theirs.last_hidden_state)
    assert torch.equal(x, before)


@pytest.mark.oracle
def test_logits() -> None:
    truth = oracle(2)
    text = text_of(truth)
    ids = torch.randint(0, 500, (1, 23), generator=torch.Generator().manual_seed(2))
    expected = truth.find("Qwen2_5OmniThinkerForConditionalGeneration")(input_ids=ids).logits
    x = truth.tensors[EMBEDDING[0]][ids]
    places = torch.arange(23).expand(3, 1, 23)
    hidden = run(text.model, x, places, [23])
    logits = text.logits(hidden[:, -1])
    assert logits.dtype == torch.float32
    assert_close(logits, expected[:, -1])


@pytest.mark.oracle
def test_sixteen_bit() -> None:
    """bf16 rounds where transformers rounds: no further from it, nor from fp32, than it is."""
    truth = oracle(3)
    exact = truth.find("Qwen2_5OmniThinkerTextModel")
    rounded = copy.deepcopy(exact)
    # Parameters only, as in loading: its rotary frequencies are a buffer, and stay in fp32.
    for weight in rounded.parameters():
        weight.data = weight.data.bfloat16()
    x, positions = sample(truth.config.thinker.text, 3)
    x = x.bfloat16()
    expected, theirs = (
        model(inputs_embeds=values, position_ids=positions, use_cache=False).last_hidden_state
        for model, values in ((exact, x.float()), (rounded, x))
    )
    ours = run(text_of(truth).bfloat16().model, x, positions, [TOKENS])
    assert ours.dtype == torch.bfloat16
    rounding = (theirs.float() - expected).square().mean().sqrt()
    assert (ours.float() - theirs.float()).square().mean().sqrt() < 0.3 * rounding


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", [[7] * 5 + [6], [16, 16, 9], [1] * TOKENS, [30] + [1] * 11])
def test_chunks_equal_the_whole(sizes: list[int], variant: dict[str, Any]) -> None:
    truth = oracle(4, **variant)
    decoder = text_of(truth).model
    x, positions = sample(decoder.config, 4, batch=2)
    assert_close(run(decoder, x, positions, sizes), run(decoder, x, positions, [TOKENS]))


def test_a_full_cache_says_so() -> None:
    config = DecoderConfig(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=32, num_hidden_layers=1, mrope_section=(2, 3, 3),
    )  # fmt: skip
    decoder = Decoder(config, dense, "thinker.model")
    cache = KVCache(1, 1, 1, 4, 16, torch.float32, "cpu")
    rope = decoder.rope(torch.zeros(3, 1, 3, dtype=torch.long), torch.float32)
    x = torch.zeros(1, 3, 32)
    decoder(x, rope, cache, 1)
    with pytest.raises(ValueError, match="5 tokens in a KV cache made for 4"):
        decoder(x, rope, cache, 2)
    cache.free()
    assert cache.nbytes == 0


def test_cache_bytes_are_those_of_its_tensor() -> None:
    cache = KVCache(3, 2, 4, 11, 8, torch.bfloat16, "meta")
    assert cache.nbytes == KVCache.bytes_for(3, 2, 4, 11, 8, torch.bfloat16)
    assert cache.nbytes == cache.data.untyped_storage().nbytes() == 3 * 2 * 2 * 4 * 11 * 8 * 2


def test_every_linear_is_asked_for_by_its_checkpoint_name() -> None:
    truth = oracle(0)
    asked = {}

    def note(name: str, in_features: int, out_features: int, bias: bool) -> nn.Module:
        asked[name] = (out_features, in_features, bias)
        return nn.Linear(in_features, out_features, bias)

    with torch.device("meta"):
        ThinkerText(truth.config.thinker, note)
    names = [
        name.removesuffix(".weight")
        for name, tensor in truth.tensors.items()
        if name.startswith(("thinker.model.layers.", "thinker.lm_head")) and tensor.ndim == 2
    ]
    stored = {
        name: (*truth.tensors[f"{name}.weight"].shape, f"{name}.bias" in truth.tensors)
        for name in names
    }
    assert asked == stored
