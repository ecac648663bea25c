"""The row of llama.cpp: what its library is asked, with one of our own in its place."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lowvram.bench import decode
from lowvram.bench.clock import Timing
from lowvram.bench.llama import LlamaThinker
from lowvram.bench.llama_file import EMBEDDING, F32, Q4_0, Q8_0, tensors, write_gguf
from lowvram.cli import bench
from lowvram.config import DecoderConfig, OmniConfig
from lowvram.errors import DeviceError

TEXT = OmniConfig.from_dict(dict(bench.shapes("pocket"))).thinker.text


class Llama:
    """Remembers what it is asked, and reads the file while it is there."""

    opened: list[Llama]

    def __init__(self, *, model_path: str, **options: Any) -> None:
        self.path, self.options = Path(model_path), options
        self.start = self.path.read_bytes()[:24]
        self.ctx, self.n_tokens, self.closed = object(), 0, False
        self.asked: list[tuple[int, int]] = []
        self.opened.append(self)

    def eval(self, tokens: list[int]) -> None:
        assert all(0 <= token < TEXT.vocab_size for token in tokens)
        self.asked.append((self.n_tokens, len(tokens)))
        self.n_tokens += len(tokens)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("llama_cpp")
    Llama.opened = []
    module.Llama = Llama  # type: ignore[attr-defined]
    module.waited = []  # type: ignore[attr-defined]
    module.llama_get_logits = module.waited.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    return module


def test_it_is_asked_for_one_token_after_the_context_and_for_the_whole_prompt(
    library: ModuleType,
) -> None:
    with LlamaThinker(TEXT, 128, 512) as theirs:
        (model,) = Llama.opened
        assert not model.path.parent.exists()
        theirs.step()
        theirs.step()
        theirs.prefill(512)
        theirs.step()
        assert model.asked == [(0, 128), (128, 1), (128, 1), (0, 512), (128, 1)]
        assert library.waited == [model.ctx] * 5
        assert model.options == {
            "n_ctx": 512,
            "n_batch": 512,
            "n_threads": torch.get_num_threads(),
            "n_threads_batch": torch.get_num_threads(),
            "use_mmap": False,
            "verbose": False,
        }
        assert model.start == b"GGUF" + struct.pack("<IQQ", 3, len(tensors(TEXT)), 11)
    assert model.closed


@pytest.mark.usefixtures("library")
def test_the_row_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "read_bandwidth", lambda nbytes: 1e9)
    seconds = iter([0.5, 4.0, 2.0])

    def measured(works: Sequence[Callable[[], object]], _: float) -> list[Timing]:
        if len(works) > 1:
            return [Timing(1, 1) for _ in works]
        works[0]()
        return [Timing(next(seconds), 0.25)]

    monkeypatch.setattr(decode, "interleave", measured)
    idle = SimpleNamespace(step=None, prefill=print)
    monkeypatch.setattr(decode, "PublishedThinker", lambda *shapes: idle)
    row = decode.bench_decode(bench.shapes("pocket"), ["head4"])[-1]
    assert (row.name, row.head) == ("llama.cpp", "8-bit")
    assert (row.decode_tokens_s, row.prefill_tokens_s) == (2.0, 128.0)
    assert row.prefill_128_tokens_s == 64.0
    assert (
        Llama.opened[0].asked == [(0, 128), (128, 1), (0, 512), (0, 128)] and Llama.opened[0].closed
    )
    # Half a byte a weight and a step for 32 of them; the head a byte a weight and a step.
    text = TEXT
    width, inner, kv = text.hidden_size, text.intermediate_size, 2 * text.head_dim
    layer = (2 * width * (width + kv) + 3 * width * inner) * 18 // 32
    layer += 4 * (3 * width + 2 * kv)
    head = width * text.vocab_size * 34 // 32
    seen = 128 * 2 * 2 * kv * text.num_hidden_layers
    assert row.bytes_per_token == text.num_hidden_layers * layer + head + 4 * width + seen


@pytest.mark.parametrize("failure", [RuntimeError, OSError, ImportError])
def test_without_it_there_is_a_reason_and_nothing_is_left(
    failure: type[Exception], library: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if failure is ImportError:
        monkeypatch.setitem(sys.modules, "llama_cpp", None)

    def refuse(**options: Any) -> None:
        raise failure("no")

    library.Llama = refuse  # type: ignore[attr-defined]
    with pytest.raises(DeviceError, match="llama-cpp-python"), LlamaThinker(TEXT, 8, 16):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("library")
def test_no_file_is_begun_without_room_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(DeviceError, match=r"0\.0 GB free"), LlamaThinker(TEXT, 8, 16):
        pass
    assert Llama.opened == []


def test_the_file_s_tensors_are_the_model_s_and_lie_where_it_says(tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    write_gguf(path, TEXT)
    found = tensors(TEXT)
    data = path.read_bytes()
    size = sum(-(-tensor.nbytes // 32) * 32 for tensor in found)
    header = len(data) - size
    assert header % 32 == 0 and 0 < header < 32 * 1024
    assert {t.kind for t in found} == {F32, Q4_0, Q8_0}
    assert [t.name for t in found if t.kind is Q8_0] == ["output.weight"]
    assert found[0].name == EMBEDDING and len(found) == 12 * TEXT.num_hidden_layers + 3
    # The head is last: its first block is a step of 0.02/127 and 32 integers.
    block = data[-found[-1].nbytes :][:34]
    assert struct.unpack("<e", block[:2])[0] == pytest.approx(0.02 / 127, rel=1e-3)
    start = header
    for tensor in found:
        if tensor.kind is F32:
            value = 0.0 if tensor.name.endswith("bias") else 1.0
            values = np.frombuffer(data, "<f4", *tensor.shape, start)
            assert (values == value).all(), tensor.name
        start += -(-tensor.nbytes // 32) * 32


def test_the_file_of_the_3b_has_its_size() -> None:
    raw = bench.shapes("Qwen2.5-Omni-3B")
    text = OmniConfig.from_dict(dict(raw)).thinker.text
    assert isinstance(text, DecoderConfig)
    assert sum(tensor.nbytes for tensor in tensors(text)) == pytest.approx(2.07e9, rel=0.01)
