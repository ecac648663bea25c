"""Sources, places and calibration sets that will not do, and disks that are full."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowvram.errors import CheckpointError, DoesNotFitError, LowVRAMError, MediaError, UsageError
from lowvram.offload import Store
from lowvram.pocket import make_checkpoint
from lowvram.quantize import shards

Run = Callable[..., Any]


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    """A copy of the source, to be spoilt."""
    return shutil.copytree(source, tmp_path / "model")


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def poke(model: Path, name: str, value: bytes) -> None:
    """Overwrite the first bytes of a stored tensor."""
    with Store.open(model) as store:
        info = store.info(name)
    with info.file.open("r+b") as file:
        file.seek(info.offset)
        file.write(value)


def refused(error: type[Exception], match: str, quantize: Run, model: Path, **options: Any) -> None:
    with pytest.raises(error, match=match):
        quantize(
            model, model.parent / "result", **{"calibration": "none", "method": "rtn"} | options
        )
    assert not (model.parent / "result").exists()


def test_a_quantized_source(whole: Path, quantize: Run, tmp_path: Path) -> None:
    model = shutil.copytree(whole, tmp_path / "model")
    refused(CheckpointError, "is quantized already; wanted the 16- or 32-bit", quantize, model)


def test_a_missing_shard(model: Path, quantize: Run) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()
    refused(CheckpointError, "lacks the shard model-00002-of-00002", quantize, model)


def test_a_missing_tensor_or_one_of_the_wrong_shape(
    quantize: Run, small: Run, tmp_path: Path
) -> None:
    model = make_checkpoint(tmp_path / "model", config=small(), speech=False)
    config = json.loads((model / "config.json").read_text())
    for layers, width, match in ((3, 512, "missing thinker.model.layers.2"), (2, 640, "shape")):
        config["thinker_config"]["text_config"] |= {
            "num_hidden_layers": layers,
            "intermediate_size": width,
        }
        (model / "config.json").write_text(json.dumps(config))
        refused(CheckpointError, match, quantize, model)


def test_no_layer_at_all(quantize: Run, small: Run, tmp_path: Path) -> None:
    config = small(num_hidden_layers=0)
    model = make_checkpoint(tmp_path / "model", config=config, speech=False)
    refused(CheckpointError, "has no decoder layer: there is nothing to quantize", quantize, model)


def test_tied_weights(model: Path, quantize: Run) -> None:
    edit_config(model, tie_word_embeddings=True)
    refused(CheckpointError, "has tied weights", quantize, model)


def test_another_architecture(model: Path, quantize: Run) -> None:
    edit_config(model, model_type="llama")
    refused(CheckpointError, "model_type 'llama'; wanted 'qwen2_5_omni'", quantize, model)


@pytest.mark.parametrize(
    "name",
    [
        "thinker.model.layers.1.mlp.up_proj.weight",
        "thinker.model.layers.0.self_attn.k_proj.bias",
        "thinker.visual.blocks.0.attn.q.weight",
        "token2wav.code2wav_bigvgan_model.conv_pre.bias",
    ],
)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_no_numbers(model: Path, name: str, value: float, quantize: Run) -> None:
    bits = np.float32(value).view(np.uint32)
    with Store.open(model) as store:
        wide = store.info(name).dtype == "F32"
    poke(model, name, bits.tobytes() if wide else (bits >> 16).astype(np.uint16).tobytes())
    refused(CheckpointError, f"{name} in .* holds NaN or infinity", quantize, model)


def test_groups_that_do_not_divide(quantize: Run, small: Run, tmp_path: Path) -> None:
    config = small(intermediate_size=544)
    model = make_checkpoint(tmp_path / "model", config=config, speech=False)
    refused(UsageError, "groups of 128 do not divide; wanted --group-size 32", quantize, model)


@pytest.mark.parametrize("place", ["inner", ".", "..", "../model/a/.."])
def test_places_within_each_other(place: str, model: Path, quantize: Run) -> None:
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="within each other"):
            quantize(model, model / place, overwrite=overwrite)
    assert (model / "config.json").exists()


def test_places_that_cannot_be(model: Path, quantize: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        quantize(model, tmp_path / "no" / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        quantize(model, tmp_path / "file", overwrite=True)


def test_too_little_memory_says_how_much_would_do(model: Path, quantize: Run) -> None:
    refused(DoesNotFitError, r"too little .* wanted at least \d+", quantize, model, max_memory=1000)


def test_a_disk_with_too_little_room(
    model: Path, quantize: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, 1000))
    refused(LowVRAMError, r"has 1000 bytes free; wanted \d", quantize, model)


def test_a_disk_that_is_full_while_writing_can_be_gone_on_with(
    model: Path,
    rounded: Path,
    quantize: Run,
    read: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    real = shards.os.fsync
    calls: list[int] = []

    def full(number: int) -> None:
        calls.append(number)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(shards.os, "fsync", full)
    refused(LowVRAMError, "No space left on device; what is finished is kept", quantize, model)
    quantize(model, tmp_path / "result", calibration="none", method="rtn", resume=True)
    assert read(tmp_path / "result") == read(rounded)


def test_memory_that_runs_out_is_said_and_other_faults_are_not_hidden(
    model: Path, quantize: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Exception] = [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ]

    def fail(*_: Any, **__: Any) -> None:
        raise errors.pop()

    monkeypatch.setattr("lowvram.quantize.layers.quantize_layer", fail)
    for _ in range(3):
        refused(DoesNotFitError, "go on with --resume", quantize, model, resume=True)
    for fault in ("a fault", "CUDA error: an illegal memory access was encountered"):
        errors.append(RuntimeError(fault))
        refused(RuntimeError, fault, quantize, model, resume=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 8}, "--bits 8"),
        ({"group_size": 16}, "--group-size 16"),
        ({"method": "magic"}, "unknown method 'magic'; wanted awq, awq\\+gptq, rtn"),
        ({"method": "awq+gptq"}, "weighs errors by inputs; wanted --calibration other than none"),
        ({"samples": 0}, "--samples 0"),
        ({"seq_len": 1}, "--seq-len 1"),
        ({"calibration": "nowhere"}, "nowhere is neither a folder nor a file"),
        ({"device": "meta"}, "nothing can be quantized on meta"),
    ],
)
def test_options_out_of_range(
    options: dict[str, Any], match: str, model: Path, quantize: Run
) -> None:
    refused(UsageError, match, quantize, model, **options)


def test_a_calibration_set_of_which_nothing_can_be_read(
    model: Path, quantize: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    refused(UsageError, "holds no pictures", quantize, model, calibration=str(folder))
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "empty.txt").touch()
    refused(MediaError, "none of the 2 calibration items", quantize, model, calibration=str(folder))
