"""Bytes of parts and units: what headers hold, what kernels keep, what is streamed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lowvram.checkpoint import Checkpoint, resolve
from lowvram.planner import ModelFacts, config_facts, model_facts
from lowvram.pocket import make_checkpoint
from lowvram.specs import SPECS
from lowvram.tensors import PARTS


@pytest.fixture(scope="module")
def whole() -> Checkpoint:
    return resolve("pocket")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return resolve(make_checkpoint(tmp_path_factory.mktemp("awq"), awq=True))


def stored(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes in the file, part by part."""
    found = dict.fromkeys(PARTS, 0)
    for name in checkpoint.store.names():
        part = "embed" if "thinker.model.embed" in name else name.split(".")[0]
        part = {"thinker": name.split(".")[1], "talker": "talker"}.get(part, part)
        part = {"audio_tower": "audio", "model": "text", "lm_head": "text"}.get(part, part)
        found[part] += checkpoint.store.info(name).nbytes  # type: ignore[index]
    return dict(found)


def test_parts_take_what_the_file_holds(whole: Checkpoint, packed: Checkpoint) -> None:
    facts, wanted = model_facts(whole), stored(whole)
    sizes = {part: facts.part_sizes(part, 2) for part in PARTS}
    assert {part: one.total + one.passing for part, one in sizes.items()} == wanted
    assert {part for part, one in sizes.items() if one.passing} == {"token2wav"}
    assert facts.part_sizes("text", 4).total == 2 * wanted["text"]
    assert facts.part_sizes("token2wav", 2) == facts.part_sizes("token2wav", 4)
    assert model_facts(packed).part_sizes("text", 2).total == stored(packed)["text"]


def test_the_fast_kernel_keeps_an_offset_for_each_group_in_place_of_a_zero_point(
    packed: Checkpoint,
) -> None:
    facts = model_facts(packed)
    groups = sum(
        packed.store.info(n).nbytes // 2 for n in packed.store.names() if n.endswith(".scales")
    )
    slow, fast = (facts.part_sizes("text", 2, kernel) for kernel in ("reference", "cpu"))
    assert fast.total == slow.total + groups * 2 - groups // 2
    assert fast.rest == slow.rest
    assert [unit.blob for unit in fast.units] == [unit.blob for unit in slow.units]


def test_a_config_alone_says_what_the_checkpoint_says(
    whole: Checkpoint, packed: Checkpoint
) -> None:
    for checkpoint in (whole, packed):
        opened, alone = model_facts(checkpoint), config_facts("any", checkpoint.config)
        for part in PARTS:
            assert opened.part_sizes(part, 2, "cpu") == alone.part_sizes(part, 2, "cpu")
        assert alone.packed == opened.packed
        assert alone.stored_dtype == checkpoint.config.dtype


def test_units_are_layers_then_pieces_of_the_head() -> None:
    facts = config_facts("7B", SPECS["Qwen2.5-Omni-7B-AWQ"].config)
    text = facts.part_sizes("text", 2)
    assert text.layers == 28
    pieces = text.units[28:]
    assert sum(piece.held for piece in pieces) == 152064 * 3584 * 2
    assert max(piece.blob for piece in pieces) <= 32 * 2**20 < text.units[0].blob
    assert text.rest == 3584 * 2
    layer = text.units[0]
    assert layer.packed == 3584 * (3584 + 1024 + 3584 + 3 * 18944)
    assert 0 <= layer.blob - layer.held < 27 * 512
    assert not facts.part_sizes("text", 2, used=("head4",)).units[28:]
    assert facts.part_sizes("talker", 2).layers == 24 == len(facts.part_sizes("talker", 2).units)
    assert not facts.part_sizes("visual", 2).units


def test_a_blob_is_laid_out_as_the_loader_lays_it_out(packed: Checkpoint) -> None:
    import torch

    from lowvram.offload import blob_bytes
    from lowvram.parts import build_parts

    facts = model_facts(packed)
    for part in build_parts(packed, torch.bfloat16, speech=True, kernel="auto"):
        units = part.units(part.build())
        sizes = [
            blob_bytes(
                tensor.numel() * (2 if tensor.is_floating_point() else tensor.itemsize)
                for tensor in (*unit.parameters(), *unit.buffers())
            )
            for unit in units
        ]
        assert [unit.blob for unit in facts.part_sizes(part.name, 2).units] == sizes  # type: ignore[arg-type]


def test_without_speech_voices_are_not_looked_at(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "spk_dict.pt").unlink()
    facts: ModelFacts = model_facts(resolve(folder), speech=False)
    assert facts.voice_frames == 0 and math.prod(facts.tensors["talker.codec_head.weight"])


def test_only_kernels_that_leave_what_streams_to_the_reference_take_its_scratch(
    packed: Checkpoint,
) -> None:
    facts = model_facts(packed)
    reference = facts.part_sizes("text", 2, "reference").scratch
    for kernel in ("cpu", "tinygemm", "triton"):
        assert facts.part_sizes("text", 2, kernel).scratch_streamed == reference  # type: ignore[arg-type]
    native = facts.part_sizes("text", 2, "native")
    assert native.scratch_streamed == native.scratch < reference
