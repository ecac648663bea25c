"""Options that may change results: which are in effect, what they take, what is said of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from lowvram.conversation import PromptShape
from lowvram.engine.pieces import VocodeSettings
from lowvram.engine.vocode import NoiseSource, SpeechStream
from lowvram.engine.voice import Voice
from lowvram.models import KVCache, Talker, Token2Wav
from lowvram.models.kv_rounded import RoundedKVCache
from lowvram.offload import Budget, Meter, guard_bytes, open_device
from lowvram.parts import rounded
from lowvram.planner import DeviceFacts, DtypeChoice, Plan, config_facts, laws, make_plan
from lowvram.planner.kernels import kernels_of
from lowvram.planner.model import PartSizes
from lowvram.planner.question import Question
from lowvram.planner.sound import vocode_bytes
from lowvram.quant import RoundedLinear, Scratch, eight_bit_scratch_bytes, rounded_bytes
from lowvram.settings import GenerationSettings
from lowvram.specs import SPECS

GIB, MIB = 2**30, 2**20
SEVEN = config_facts("7B", SPECS["Qwen2.5-Omni-7B-AWQ"].config)
VOICE_QUESTION = PromptShape(tokens=300, next_position=300, grids=(), audio_frames=(1000,))
ALLOWED = ("head8", "talker8", "vocoder16")


def plan(
    budget: float,
    *allow: str,
    kind: str = "cuda",
    on_device: frozenset[str] = frozenset(),
    made_with: tuple[str, ...] | None = None,
    **request: Any,
) -> Plan:
    context = int(0.45 * GIB) if kind == "cuda" else 0
    size = int(budget * GIB)
    return make_plan(
        SEVEN,
        VOICE_QUESTION,
        GenerationSettings(**{"max_speech_seconds": 30.0, **request}),
        facts=DeviceFacts(
            name=kind,
            type=kind,
            total_bytes=24 * GIB,
            free_bytes=23 * GIB,
            context_bytes=context,
        ),
        budget=Budget(budget_bytes=size, context_bytes=context, guard_bytes=guard_bytes(size)),
        dtype=DtypeChoice("bfloat16", "asked for"),
        allow=allow,
        on_device=on_device,
        made_with=made_with,
        host_free=16 * GIB,
    )


def said(found: Plan, of: str) -> str:
    (line,) = [reason for reason in found.reasons if reason.startswith(of)]
    return line


def test_a_card_of_8_gib_speaks_while_it_writes() -> None:
    plain, allowed = plan(7.2), plan(7.2, *ALLOWED)
    assert plain.fits and allowed.fits and not plain.used
    assert allowed.used == ALLOWED
    assert plain.phases[-1].name == "talk+vocode"
    together = allowed.phases[-1]
    assert together.name == "decode+talk+vocode"
    assert set(together.on_device) >= {"text", "talker", "token2wav"}
    assert said(allowed, "talker8: ") == "talker8: 2.52 GiB of the talker become 1.3 GiB"
    assert "of the token2wav become" in said(allowed, "vocoder16: ")

    def heard(found: Plan) -> float:
        return float(said(found, "the first sound").split("about ")[1].split(" s")[0])

    assert heard(allowed) < heard(plain) / 2


def test_a_talker_that_must_stream_is_not_rounded() -> None:
    assert "talker8" in plan(3.0, "talker8", kind="npu").used
    least = plan(1.0, kind="npu").minimum_budget_bytes
    small = plan(least / GIB, "talker8", kind="npu")
    assert small.fits and not small.used and small.placements["talker"].streamed
    assert "does not fit" in said(small, "talker8 is not used")
    assert small.minimum_budget_bytes == least


def test_what_would_help_is_named() -> None:
    refused = plan(1.0, "vocoder16")
    assert not refused.fits
    assert not any("vocoder16" in knob for knob in refused.knobs)
    waiting = plan(7.2)
    offered = [one.split(" ")[0] for one in waiting.reasons if one.endswith(", where allowed")]
    assert set(offered) >= {"talker8", "vocoder16"}
    assert not any(one.endswith("where allowed") for one in plan(7.2, *ALLOWED).reasons)


def test_rounded_keys_and_values_are_half_and_one_layer_more() -> None:
    wide, rounded_too = plan(9), plan(9, "kv8")
    before, after = (found.phase("prefill").parts["kv"] for found in (wide, rounded_too))
    assert 0.5 * before < after < (136 / 256 + 1 / 28 + 0.001) * before
    assert said(rounded_too, "kv8: ").endswith("of the talker's keys and values become 48.39 MiB")
    on_host = plan(3.0, "kv8"), plan(3.0)
    assert {found.kv["thinker"] for found in on_host} == {"host"}
    assert on_host[0].host_bytes < on_host[1].host_bytes


def test_a_module_built_otherwise_is_loaded_anew() -> None:
    there = frozenset({"talker"})
    same = plan(9, "talker8", on_device=there, made_with=("talker8", "head8"))
    anew = plan(9, "talker8", on_device=there, made_with=())
    assert same.residency["talker"] == anew.residency["talker"] == "resident"
    talker = SEVEN.part_sizes("talker", 2, used=("talker8",), aligned=True).total
    assert anew.bytes_to_move - same.bytes_to_move == talker


def sizes(part: Any, *used: str) -> PartSizes:
    return SEVEN.part_sizes(part, 2, used=used)


def test_halves_are_halves() -> None:
    plain, eight = sizes("talker"), sizes("talker", "talker8")
    assert eight.rest == plain.rest and eight.layers == plain.layers == len(eight.units)
    assert 0.5 < (eight.total - eight.rest) / (plain.total - plain.rest) < 0.505
    assert [unit.blob for unit in eight.units] == [unit.blob for unit in plain.units]
    assert sizes("text", "talker8") == sizes("text")
    full, half = sizes("token2wav"), sizes("token2wav", "vocoder16")
    assert half.passing == full.passing
    dit = 22 * 2 * (4 * 1024 * 1024 + 4 * 1024 + 2 * 2 * 1024 * 1024 + 3 * 1024)
    assert full.total - half.total == dit


def test_a_rounded_talker_takes_scratch_and_more_to_load() -> None:
    question = Question(
        model=SEVEN,
        shape=VOICE_QUESTION,
        settings=GenerationSettings().completed(SEVEN.generation),
        facts=DeviceFacts(name="npu", type="npu", total_bytes=GIB, free_bytes=GIB, context_bytes=0),
        dtype=DtypeChoice("bfloat16", "asked for"),
        allow=("talker8",),
    )
    eight, plain = (way.request().talk("device", 512, False) for way in question.ways())
    # gate_proj and up_proj may come to lie side by side.
    assert eight.workspace - plain.workspace == eight_bit_scratch_bytes(896, 2 * 18944)
    assert eight.loading - plain.loading == 2 * rounded_bytes(896, 18944)


META = kernels_of("meta")


def measured(work: Any) -> int:
    meter = Meter(open_device("meta"))
    with meter.phase("work"), torch.inference_mode():
        work()
    return meter.phases[0].peak_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_rounded_talker_takes_its_law(dtype: torch.dtype) -> None:
    config = SEVEN.config.talker
    assert config is not None
    decoder = dataclasses.replace(config.decoder, num_hidden_layers=2)
    config = dataclasses.replace(config, decoder=decoder)
    scratch = Scratch()
    with torch.device("meta"):
        model = Talker(config, rounded(scratch)).to(dtype).requires_grad_(False)

    def rows(width: int) -> Any:
        return lambda start, stop: torch.empty(stop - start, width, dtype=dtype, device="meta")

    for linear in model.modules():
        if isinstance(linear, RoundedLinear):
            linear.fill_from(rows(linear.in_features), torch.device("meta"))
    shape = (2, 1, decoder.num_key_value_heads, 612, decoder.head_dim)
    cache = KVCache(*shape, dtype, "meta")

    def work() -> None:
        scratch.free()
        x = model.project(torch.empty(1, 512, config.embedding_size).to("meta", dtype))
        rope = model.model.rope(torch.zeros(3, 1, 512, dtype=torch.long), dtype)
        model.logits(model.model(x, rope, cache, 100)[:, -1])

    seen = measured(work)
    law = laws.talk_bytes(config, 512, dtype.itemsize, 512, META)
    law += eight_bit_scratch_bytes(18944, 896, dtype.itemsize)
    assert seen <= law <= 1.1 * seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_writing_rounded_keys_and_values_is_within_the_law(dtype: torch.dtype) -> None:
    config = SEVEN.config.talker
    assert config is not None
    decoder = dataclasses.replace(config.decoder, num_hidden_layers=2)
    config = dataclasses.replace(config, decoder=decoder)
    with torch.device("meta"):
        model = Talker(config).to(dtype).requires_grad_(False)
    shape = (2, 1, decoder.num_key_value_heads, 612, decoder.head_dim)
    cache = RoundedKVCache(*shape, dtype, "meta")
    for tokens in (1, 512):

        def work(tokens: int = tokens) -> None:
            x = model.project(torch.empty(1, tokens, config.embedding_size).to("meta", dtype))
            rope = model.model.rope(torch.zeros(3, 1, tokens, dtype=torch.long), dtype)
            model.logits(model.model(x, rope, cache, 100)[:, -1])

        seen = measured(work)
        law = laws.talk_bytes(config, tokens, dtype.itemsize, 512, META)
        assert seen <= law
    assert law <= 1.1 * seen


@functools.cache
def halved() -> Token2Wav:
    with torch.device("meta"):
        return Token2Wav(SEVEN.config, torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize(("codes", "exact"), [(70, False), (60, True)])
def test_half_a_vocoder_takes_its_law(codes: int, exact: bool) -> None:
    config = SEVEN.config
    assert config.dit is not None and config.bigvgan is not None
    voice = Voice("any", 0, torch.zeros(1, config.dit.enc_emb_dim), torch.zeros(1, 400, 80))
    settings, model = VocodeSettings(exact=exact), halved()

    def work() -> None:
        stream = SpeechStream(model, voice, NoiseSource(0), settings)
        for piece in (*stream.push([0] * codes), *stream.finish()):
            assert len(piece.samples)

    seen = measured(work)
    law = vocode_bytes(config.dit, config.bigvgan, settings, codes, 400, META, itemsize=2)
    assert seen <= law <= 1.1 * seen
