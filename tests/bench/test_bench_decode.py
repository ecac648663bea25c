"""`bench decode` on the built-in model's shapes: every row, and what its numbers are made of."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lowvram.bench import decode
from lowvram.bench.clock import FEWEST, interleave
from lowvram.cli import bench
from lowvram.cli.main import main
from lowvram.errors import CheckpointError, UsageError
from lowvram.quant import head_bytes

FIELDS = {"name", "head", "decode_tokens_s", "prefill_tokens_s", "bytes_per_token"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(decode, "read_bandwidth", lambda nbytes: 1e9)
    monkeypatch.setattr(decode, "interleave", lambda works, seconds: interleave(works, 0.0))


def test_the_rows_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "-m", "pocket", "--device", "cpu", "--json", "-q"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == ["ours", "ours-16bit-head", "transformers-bf16", "bound"]
    for row in rows.values():
        assert row.keys() >= FIELDS
        assert row["threads"] == torch.get_num_threads()
        assert row["decode_tokens_s_best"] >= row["decode_tokens_s"] > 0
    ours, dense = rows["ours"], rows["ours-16bit-head"]
    assert (ours["head"], dense["head"]) == ("4-bit", "16-bit")
    text = bench.shapes("pocket")["thinker_config"]["text_config"]
    width, words = text["hidden_size"], text["vocab_size"]
    saved = 2 * width * words - head_bytes(width, words, 4)
    assert dense["bytes_per_token"] - ours["bytes_per_token"] == saved
    assert rows["transformers-bf16"]["bytes_per_token"] > dense["bytes_per_token"]
    assert rows["bound"]["decode_tokens_s"] == pytest.approx(1e9 / ours["bytes_per_token"])
    for prefill in ("prefill_tokens_s", "prefill_128_tokens_s"):
        assert ours[prefill] > 0 and rows["bound"][prefill] is None


def test_the_head_is_rounded_only_where_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "--allow", "head8", "-q"]) == 0
    out = capsys.readouterr().out
    assert "8-bit" in out and "4-bit" not in out and "of bound" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "meta"], "measures the CPU"),
        (["-m", "nothing/here"], "no shapes are known"),
        (["--allow", "head9"], "unknown option"),
        (["--threads", "0"], "threads"),
    ],
)
def test_what_cannot_be_measured(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "decode", *flags]) == UsageError("").exit_code
    assert message in capsys.readouterr().err


def test_shapes_are_those_of_a_file_that_can_be_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(bench.shapes("pocket")))
    assert bench.shapes(str(tmp_path)) == bench.shapes(str(file)) == bench.shapes("pocket")
    file.write_text('{"thinker_config": [')
    with pytest.raises(CheckpointError, match=r"config\.json is no JSON"):
        bench.shapes(str(tmp_path))


def test_works_take_turns() -> None:
    calls: list[str] = []
    timings = interleave([lambda: calls.append("a"), lambda: calls.append("b")], 0.0)
    assert calls == ["a", "b"] * (FEWEST + 1)
    assert len(timings) == 2 and all(0 < one.best <= one.median for one in timings)


def test_rows_are_of_the_engines_own_model() -> None:
    config = decode.OmniConfig.from_dict(dict(bench.shapes("pocket")))
    packed = decode.PackedThinker(config.thinker, 64, 8, 16)
    packed.add_head("4-bit", 4)
    exact, rounded = packed.step("16-bit"), packed.step("4-bit")
    assert exact.shape == (1, config.thinker.text.vocab_size) and torch.isfinite(exact).all()
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.15
    assert packed.model.model.layers[0].self_attn.q_proj.joined  # type: ignore[union-attr]
