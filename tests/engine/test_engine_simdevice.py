"""Whole requests on the simulated accelerator: the CPU's replies, within the limit, in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simdevice as sim
import torch
from simdevice import simulated

from lowvram import AudioChunk, DoesNotFitError, LowVRAMOmni, Result, UsageError
from lowvram.models import attention as attention_module
from lowvram.models.bigvgan import LONGEST_TRANSPOSED
from lowvram.offload.accelerator import FALLBACK_CONTEXT_BYTES
from lowvram.offload.lane import StreamLane
from lowvram.pocket import make_checkpoint

GIB = 1 << 30
RNG = np.random.default_rng(0)
WORDS = [{"role": "user", "content": "Say something."}]
EVERYTHING = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": RNG.integers(0, 255, (56, 56, 3), dtype=np.uint8)},
            {"type": "audio", "audio": np.sin(np.arange(16_000) / 9).astype(np.float32)},
            {"type": "video", "video": RNG.integers(0, 255, (2, 56, 56, 3), dtype=np.uint8)},
            {"type": "text", "text": "What is all this?"},
        ],
    }
]
SHORT: dict[str, Any] = {"max_new_tokens": 3, "max_speech_seconds": 0.4}


@pytest.fixture(scope="module", params=["16-bit", "awq"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / request.param
    make_checkpoint(path, seed=5, awq=request.param == "awq")
    return path


@pytest.fixture(scope="module")
def wanted(folder: Path) -> dict[str, Result]:
    """Replies of the CPU, computed as on an NPU: in blocks where a mask is needed, the packed
    weights by the reference kernel."""

    def blockwise(q: Any, k: Any, v: Any, scale: float) -> torch.Tensor:
        return attention_module.blockwise(q, k, v, causal=True, scale=scale)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, opened(folder, "cpu", kernel="reference") as omni:
        patch.setattr(attention_module, "_causal_cpu", blockwise)
        words, everything = (omni.generate(asked, **SHORT) for asked in (WORDS, EVERYTHING))
    torch.set_num_threads(threads)
    return {"words": words, "everything": everything}


def opened(folder: Path, device: str = "npu", **options: Any) -> LowVRAMOmni:
    return LowVRAMOmni.from_pretrained(folder, device=device, dtype="bfloat16", **options)


def same(one: Result, other: Result) -> bool:
    return (
        one.tokens == other.tokens
        and one.codes == other.codes
        and np.array_equal(one.audio, other.audio)  # type: ignore[arg-type]
    )


def prepare_device(limit: int = 8 * GIB) -> None:
    sim.reset()
    sim.configure(limit=limit, context=FALLBACK_CONTEXT_BYTES, transposed=LONGEST_TRANSPOSED)


@simulated
def test_every_budget_gives_the_reply_of_the_cpu_within_it(
    folder: Path, wanted: dict[str, Result]
) -> None:
    prepare_device()
    with opened(folder) as omni:
        plan = omni.plan(EVERYTHING, **SHORT)
    least, most = plan.minimum_budget_bytes, plan.predicted_peak_bytes + 100 * 2**20
    for budget in (least, (least + most) // 2, most):
        prepare_device(limit=budget)
        with opened(folder, max_memory=budget) as omni:
            result = omni.generate(EVERYTHING, **SHORT)
        assert same(result, wanted["everything"])
        assert torch.npu.max_memory_reserved() + FALLBACK_CONTEXT_BYTES <= budget
        assert torch.npu.memory_stats()["num_ooms"] == 0
        for row in result.report.phases:
            assert 0 < row.measured_peak_bytes <= row.predicted_peak_bytes
        assert sim.races() == []
        assert sim.live_bytes() == sim.pinned_bytes() == 0


@simulated
def test_memory_is_where_it_was_after_every_request(
    folder: Path, wanted: dict[str, Result]
) -> None:
    prepare_device()
    with opened(folder) as omni:
        least = omni.plan(EVERYTHING, **SHORT).minimum_budget_bytes
    with opened(folder, max_memory=least) as omni:
        omni.generate(EVERYTHING, **SHORT)
        after_everything = books()
        omni.generate(WORDS, **SHORT)
        after_words = books()
        for _ in range(4):
            assert same(omni.generate(WORDS, **SHORT), wanted["words"])
            assert books() == after_words
        assert same(omni.generate(EVERYTHING, **SHORT), wanted["everything"])
        assert books() == after_everything
    assert books()[:2] == (0, 0)
    assert sim.races() == []


def books() -> tuple[int, int, int]:
    return sim.live_bytes(), sim.live_storages(), sim.pinned_bytes()


@simulated
def test_a_closed_stream_gives_back_what_it_had(folder: Path, wanted: dict[str, Result]) -> None:
    prepare_device()
    reply = wanted["everything"]
    with opened(folder) as omni:
        for events in range(1, 6):
            stream = omni.stream(EVERYTHING, **SHORT)
            seen = [type(next(stream)) for _ in range(events)]
            stream.close()
            assert omni.resident == ()
            assert sim.live_bytes() == 0
            if AudioChunk in seen:
                break
        else:
            raise AssertionError("no sound was heard before the stream was closed")
        assert same(omni.generate(EVERYTHING, **SHORT), reply)
    assert sim.races() == []


def outcome(omni: LowVRAMOmni, wanted: Result) -> str:
    """The reply, unchanged, or an error that says what happened."""
    try:
        reply = omni.generate(WORDS, **SHORT)
    except DoesNotFitError as error:
        assert "npu:0 ran out of memory within a plan of" in str(error)
        return "refused"
    assert same(reply, wanted)
    return "answered"


@pytest.mark.parametrize("loaded", [False, True], ids=["cold", "warm"])
def test_an_allocation_that_fails_is_told_and_forgotten(
    loaded: bool, folder: Path, wanted: dict[str, Result]
) -> None:
    """At places spread over a request, with its modules on the device before or not."""

    @simulated
    def inside() -> None:
        prepare_device()
        with opened(folder) as omni:
            # What every request makes alike is made by the first.
            omni.generate(WORDS, **SHORT)
            if not loaded:
                omni._loader.close()
            sim.reset()
            before = sim.live_bytes()
            assert outcome(omni, wanted["words"]) == "answered"
            count, after = sim.allocations(), sim.live_bytes()
            for n in np.geomspace(1, count, 7).astype(int):
                if not loaded:
                    omni._loader.close()
                assert sim.live_bytes() == before
                sim.fail_allocation(int(n))
                refused = outcome(omni, wanted["words"]) == "refused"
                assert sim.refusals() == 1, f"allocation {n} of {count} was not asked for"
                assert sim.live_bytes() <= (before if refused else after)
                assert outcome(omni, wanted["words"]) == "answered"
                assert sim.live_bytes() == after
                sim.reset()
        assert sim.races() == []
        assert sim.live_bytes() == sim.pinned_bytes() == 0

    inside()


@simulated
def test_memory_taken_by_others_before_a_request_lowers_its_budget(
    folder: Path, wanted: dict[str, Result]
) -> None:
    prepare_device()
    with opened(folder, max_memory=2 * GIB) as omni:
        need = omni.plan(WORDS, **SHORT).minimum_budget_bytes
        sim.configure(others=8 * GIB - need + 2**20)
        with (
            pytest.warns(UserWarning, match="lowered to the .* that npu:0 has free"),
            pytest.raises(DoesNotFitError, match="does not fit in"),
        ):
            omni.generate(WORDS, **SHORT)
        assert sim.live_bytes() == 0
        sim.configure(others=8 * GIB - need)
        with pytest.warns(UserWarning, match="lowered to the .* that npu:0 has free"):
            assert same(omni.generate(WORDS, **SHORT), wanted["words"])
        sim.configure(others=0)
        assert same(omni.generate(WORDS, **SHORT), wanted["words"])


@simulated
def test_memory_taken_by_others_after_planning_is_told(
    folder: Path, wanted: dict[str, Result]
) -> None:
    prepare_device()
    with opened(folder, max_memory=2 * GIB) as omni:
        plan = omni._plan

        def then_taken(*of: Any) -> Any:
            made = plan(*of)
            sim.configure(others=8 * GIB - FALLBACK_CONTEXT_BYTES - 2**20)
            return made

        omni._plan = then_taken  # type: ignore[method-assign]
        with pytest.raises(DoesNotFitError, match="something else uses the device; free it"):
            omni.generate(WORDS, **SHORT)
        assert sim.live_bytes() == 0
        sim.configure(others=0)
        omni._plan = plan  # type: ignore[method-assign]
        assert same(omni.generate(WORDS, **SHORT), wanted["words"])


@simulated
def test_a_budget_above_the_device_is_refused(folder: Path) -> None:
    prepare_device(limit=GIB)
    with pytest.raises(UsageError, match="is more than npu:0 has"):
        opened(folder, max_memory=2 * GIB)


@simulated
def test_nothing_is_needed_that_ascend_computes_on_the_host(folder: Path) -> None:
    prepare_device()
    with opened(folder) as omni:
        omni.generate(EVERYTHING, **SHORT)
    assert sim.host_operators() == {}


def test_a_wait_that_is_left_out_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamLane, "wait", lambda lane, mark: None)

    @simulated
    def inside() -> None:
        prepare_device()
        with opened(folder) as omni:
            omni.generate(WORDS, **SHORT)
        assert any(race.startswith("read before written") for race in sim.races())

    inside()
