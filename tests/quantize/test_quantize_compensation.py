"""`--method awq+gptq` through the driver: nearer, resumed to the same bytes, run by the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram import LowVRAMOmni
from lowvram.quantize import Progress, QuantizeReport, QuantizeSettings, prepare_job

Run = Callable[..., QuantizeReport]
Read = Callable[[Path], dict[str, bytes]]


class Stop(BaseException):
    """What no handler of the work catches."""


@pytest.fixture(scope="module")
def made(
    source: Path, quantize: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, QuantizeReport]:
    destination = tmp_path_factory.mktemp("made") / "result"
    return destination, quantize(source, destination, method="awq+gptq", verify=True)


def test_each_layer_is_nearer_than_the_search_alone_and_the_report_says_so(
    made: tuple[Path, QuantizeReport], whole: Path
) -> None:
    folder, report = made
    searched = json.loads((whole / "quantization.json").read_text())["layers"]
    assert json.loads((folder / "quantization.json").read_text())["job"]["method"] == "awq+gptq"
    for before, after in zip(searched, report.layers, strict=True):
        assert after["error_before"] == pytest.approx(before["error_before"], rel=0.2)
        assert after["error_after"] < 0.9 * before["error_after"]
        kept = [step["group"] for step in after["steps"] if step["tried"] == "compensation"]
        assert kept == ["qkv", "o", "gate-up", "down"]
    assert len(report.layer_seconds) == 2 and min(report.layer_seconds) > 0
    assert report.to_json()["layer_seconds"] == report.layer_seconds
    rows = [line.split() for line in str(report).splitlines()[:3]]
    assert [row[3] for row in rows] == ["seconds", *(f"{s:.3g}" for s in report.layer_seconds)]
    line = next(line for line in str(report).splitlines() if line.startswith("awq+gptq: "))
    assert line.endswith(" s a layer") and " -> " in line
    assert report.verification["kl"] > 0


def test_stopped_between_layers_it_goes_on_to_the_same_bytes(
    source: Path, made: tuple[Path, QuantizeReport], quantize: Run, read: Read, tmp_path: Path
) -> None:
    def stop(at: Progress) -> None:
        if at.stage == "layer" and at.layer == 1:
            raise Stop

    result = tmp_path / "result"
    with pytest.raises(Stop):
        quantize(source, result, method="awq+gptq", on_progress=stop)
    quantize(source, result, method="awq+gptq", resume=True)
    assert read(result) == read(made[0])


def test_the_engine_answers_with_it(made: tuple[Path, QuantizeReport]) -> None:
    with LowVRAMOmni.from_pretrained(made[0], device="cpu", speech=False) as omni:
        assert omni.generate([{"role": "user", "content": "Hello"}], max_new_tokens=4).text


def test_the_plan_of_it_takes_longer_and_no_more_memory(source: Path, tmp_path: Path) -> None:
    plans = []
    for method in ("awq", "awq+gptq"):
        settings = QuantizeSettings(method=method, device="cpu", max_memory=1 << 30)
        job = prepare_job(source, tmp_path / "x", settings)
        job.source.checkpoint.store.close()
        plans.append(job.plan)
    assert plans[0].memory == plans[1].memory and plans[0].result_bytes == plans[1].result_bytes
    assert plans[0].seconds < plans[1].seconds
