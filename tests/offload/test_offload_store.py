"""The safetensors reader, against files that the safetensors package wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from written_files import entry, some_tensors, write_index, write_raw, write_sharded

from lowvram.errors import CheckpointError
from lowvram.offload import Store
from lowvram.offload import store as store_module


def test_every_type_is_read_as_it_was_written(single: Path) -> None:
    wanted = some_tensors()
    with Store.open(single) as store:
        assert set(store.names()) == set(wanted)
        for name, tensor in wanted.items():
            got = store.read(name)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(got.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
        assert store.bytes_read == sum(t.nbytes for t in wanted.values())


def test_info_and_has_read_no_data(single: Path) -> None:
    with Store.open(single) as store:
        info = store.info("cube")
        assert (info.dtype, info.shape, info.nbytes) == ("F32", (2, 3, 4), 96)
        assert info.file == single / "model.safetensors"
        raw = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
        assert raw == some_tensors()["cube"].numpy().tobytes()
        assert store.has("scalar")
        assert not store.has("scalars")
        with pytest.raises(CheckpointError, match="holds no tensor 'scalars'"):
            store.info("scalars")
        assert store.bytes_read == 0


def test_types_are_converted_on_the_way_in_bounded_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(1000, 3)
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    monkeypatch.setattr(store_module, "SCRATCH_BYTES", 1024)
    sizes: list[int] = []
    plain = store_module.Store.read_bytes

    def seen(self: Store, info: Any, start: int, out: memoryview) -> None:
        sizes.append(len(out))
        plain(self, info, start, out)

    monkeypatch.setattr(store_module.Store, "read_bytes", seen)
    with Store.open(tmp_path) as store:
        half = torch.empty(1000, 3, dtype=torch.bfloat16)
        store.read_into("x", half)
        assert torch.equal(half, tensor.to(torch.bfloat16))
        assert max(sizes) == 1024
        assert sum(sizes) == tensor.nbytes
        part = torch.empty(5)
        store.read_flat("x", 7, part)
        assert torch.equal(part, tensor.view(-1)[7:12])


def test_a_tensor_on_meta_costs_no_read(single: Path) -> None:
    with Store.open(single) as store:
        store.read_into("cube", torch.empty(2, 3, 4, device="meta"))
        assert store.bytes_read == 0


def test_a_wrong_shape_is_refused(single: Path) -> None:
    with (
        Store.open(single) as store,
        pytest.raises(CheckpointError, match=r"'cube' has shape \[2, 3, 4\]; wanted \[3, 2, 4\]"),
    ):
        store.read_into("cube", torch.empty(3, 2, 4))


@pytest.mark.parametrize("inference", [False, True])
def test_rows_keep_order_and_repeats_and_read_each_row_once(
    tmp_path: Path, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = torch.randn(50, 4, 2).to(torch.bfloat16)
    save_file({"table": table}, tmp_path / "model.safetensors")
    indices = [9, 3, 4, 5, 9, 9, 49, 0, 3]
    reads: list[int] = []
    plain = store_module.Store.read_bytes

    def seen(self: Store, info: Any, start: int, out: memoryview) -> None:
        reads.append(len(out) // 16)
        plain(self, info, start, out)

    monkeypatch.setattr(store_module.Store, "read_bytes", seen)
    with Store.open(tmp_path) as store, torch.inference_mode(inference):
        assert torch.equal(store.rows("table", indices), table[indices])
        assert reads == [1, 3, 1, 1]  # 0 | 3 4 5 | 9 | 49
        assert store.bytes_read == 6 * 16
        assert torch.equal(store.rows("table", torch.tensor([2, 3, 4])), table[2:5])
        assert store.rows("table", []).shape == (0, 4, 2)


@pytest.mark.parametrize("bad", [-1, 50])
def test_a_row_that_is_not_there_is_refused(tmp_path: Path, bad: int) -> None:
    save_file({"t": torch.zeros(50, 4), "s": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    with Store.open(tmp_path) as store:
        with pytest.raises(CheckpointError, match=rf"row {bad} of 't'.*has 50 rows"):
            store.rows("t", [1, bad])
        with pytest.raises(CheckpointError, match="'s' is a single number"):
            store.rows("s", [0])


def test_shards_are_one_store(tmp_path: Path) -> None:
    a, b = torch.randn(3, 4), torch.arange(5)
    write_sharded(tmp_path, {"a-1.safetensors": {"a": a}, "a-2.safetensors": {"b": b}})
    with Store.open(tmp_path) as store:
        assert store.names() == ("a", "b")
        assert store.info("b").file.name == "a-2.safetensors"
        assert torch.equal(store.read("a"), a)
        assert torch.equal(store.read("b"), b)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {f"s{i}.safetensors": {f"t{i}": torch.ones(1)} for i in range(3)})
    (tmp_path / "s1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shard s1\.safetensors"):
        Store.open(tmp_path)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    shards = {"s0.safetensors": {"a": torch.ones(1)}, "s1.safetensors": {"b": torch.ones(1)}}
    index = write_sharded(tmp_path, shards)
    index["weight_map"]["c"] = "s1.safetensors"
    write_index(tmp_path, index)
    with pytest.raises(CheckpointError, match=r"'c' is in s1\.safetensors, which does not hold it"):
        Store.open(tmp_path)
    del index["weight_map"]["c"]
    index["weight_map"]["a"] = "s1.safetensors"
    index["weight_map"]["z"] = "s0.safetensors"
    write_index(tmp_path, index)
    with pytest.raises(CheckpointError, match=r"'a' is in s1\.safetensors, which does not hold it"):
        Store.open(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    twice = {"a": torch.ones(1)}
    write_sharded(
        tmp_path, {"s0.safetensors": twice, "s1.safetensors": twice | {"b": torch.ones(2)}}
    )
    write_index(tmp_path, {"weight_map": {"a": "s0.safetensors", "b": "s1.safetensors"}})
    with pytest.raises(CheckpointError, match=r"'a' stands in both s0\.safetensors and s1\."):
        Store.open(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        *["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "x.bin"],
        *["..\\x.safetensors", "C:x.safetensors", "x\0.safetensors", 3, None, ["x.safetensors"]],
    ],
)
def test_an_index_may_only_name_files_beside_it(tmp_path: Path, file: object) -> None:
    write_index(tmp_path, {"weight_map": {"a": file}})
    save_file({"a": torch.ones(1)}, tmp_path.parent / "x.safetensors")
    with pytest.raises(CheckpointError, match="wanted the plain name of a"):
        Store.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not readable JSON"),
        ("[]", "is a JSON list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "names 'a' twice"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=complaint):
        Store.open(tmp_path)


def test_a_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"wanted model\.safetensors, or model\.safe"):
        Store.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"it holds pytorch_model\.bin; wanted"):
        Store.open(tmp_path)
    with pytest.raises(CheckpointError, match="it is not a folder"):
        Store.open(tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is not a file"):
        Store.open(tmp_path)


TWO = {"a": entry("F32", [2], 0, 8), "b": entry("U8", [3], 8, 11)}


@pytest.mark.parametrize(
    ("header", "data", "complaint"),
    [
        (TWO, b"x" * 10, "its header promises .*truncated"),
        (TWO, b"x" * 12, "its header promises .*damaged"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("U8", [3], 9, 12)}, b"x" * 12, "'b' starts at"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("U8", [3], 7, 10)}, b"x" * 10, "'b' starts at"),
        ({"a": entry("F32", [2], 8, 16)}, b"x" * 16, "'a' starts at"),
        ({"a": entry("F32", [3], 0, 8)}, b"x" * 8, r"'a' is F32 \[3\] in 8 bytes"),
        ({"a": entry("F32", [2], 8, 0)}, b"x" * 8, "in -8 bytes"),
        ({"a": entry("F4", [2], 8, 0)}, b"x" * 8, "in -8 bytes"),
        ({"a": entry("F32", [1 << 62] * 50, 0, 8)}, b"x" * 8, "does not agree"),
        ({"a": entry("F32", [-2], 0, 8)}, b"x" * 8, "lacks a valid dtype, shape"),
        ({"a": entry("F32", [2.0], 0, 8)}, b"x" * 8, "lacks a valid dtype, shape"),  # type: ignore[list-item]
        ({"a": entry("F32", [True], 0, 4)}, b"x" * 4, "lacks a valid dtype, shape"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"x" * 8, "lacks a valid dtype, shape"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}, b"x" * 8, "lacks a valid"),
        ({"a": {"dtype": 3, "shape": [2], "data_offsets": [0, 8]}}, b"x" * 8, "lacks a valid"),
        ({"a": 5}, b"", "lacks a valid dtype, shape"),
        ([], b"", "no JSON object"),
        (b"", b"", "no JSON object"),
        (b"{", b"", "not readable JSON"),
        (b'{"a\xff": 1}', b"", "not readable JSON"),
        (b'{"a": ' + b"[" * 100_000, b"", "not readable JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "not readable JSON"),
        (b'{"a": 1, "a": 2}', b"", "names 'a' twice"),
    ],
)
def test_a_header_the_format_forbids_is_refused(
    tmp_path: Path, header: object, data: bytes, complaint: str
) -> None:
    path = write_raw(tmp_path, header, data)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        Store.open(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("length", "complaint"),
    [
        (1 << 63, "the format allows 100000000"),
        (100_000_001, "the format allows 100000000"),
        (5000, "announces a header of 5000 bytes but has only"),
    ],
)
def test_a_header_longer_than_its_file_is_not_believed(
    tmp_path: Path, length: int, complaint: str
) -> None:
    write_raw(tmp_path, TWO, b"x" * 11, length=length)
    with pytest.raises(CheckpointError, match=complaint):
        Store.open(tmp_path)


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_too_short_for_its_length_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\0" * size)
    with pytest.raises(CheckpointError, match=f"has {size} bytes; a safetensors file has at least"):
        Store.open(tmp_path)


def test_an_unknown_type_matters_only_when_its_tensor_is_wanted(tmp_path: Path) -> None:
    header = {"odd": entry("F4", [3], 0, 2), "b": entry("U8", [3], 2, 5)}
    write_raw(tmp_path, header, b"\0\0abc")
    with Store.open(tmp_path) as store:
        assert bytes(store.read("b").tolist()) == b"abc"
        with pytest.raises(CheckpointError, match=r"'odd' has type 'F4'; wanted one of .*BF16"):
            store.read("odd")


def test_padding_and_metadata_are_part_of_the_format(tmp_path: Path) -> None:
    text = json.dumps({"__metadata__": {"format": "pt"}} | TWO).encode() + b"   "
    write_raw(tmp_path, text, b"\0" * 8 + b"abc")
    with Store.open(tmp_path) as store:
        assert store.names() == ("a", "b")


def test_a_file_cut_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    with Store.open(tmp_path) as store:
        os.truncate(tmp_path / "model.safetensors", 1000)
        with pytest.raises(CheckpointError, match="ends inside 'a': it was changed while in use"):
            store.read("a")


def test_short_reads_are_continued(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, offset: plain(fd, [buffers[0][:7]], offset)
    )
    with Store.open(single) as store:
        assert torch.equal(store.read("cube"), some_tensors()["cube"])


def test_a_failing_disk_is_a_checkpoint_error(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with (
        Store.open(single) as store,
        pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors: Input/output"),
    ):
        store.read("cube")


def test_reads_without_positioned_reads(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    with Store.open(single) as store:
        assert torch.equal(store.read("cube"), some_tensors()["cube"])
        assert torch.equal(store.read("of.int64"), some_tensors()["of.int64"])


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_files_are_closed_after_use_and_after_a_refusal(tmp_path: Path, single: Path) -> None:
    before = open_files()
    with Store.open(single) as store:
        assert open_files() == before + 1
    assert open_files() == before
    with pytest.raises(ValueError, match="is closed"):
        store.read("cube")
    bad = tmp_path / "bad"
    bad.mkdir()
    index = write_sharded(bad, {f"s{i}.safetensors": {f"t{i}": torch.ones(1)} for i in range(3)})
    refuse: list[Callable[[], object]] = [
        lambda: write_index(bad, {"weight_map": {**index["weight_map"], "x": "s1.safetensors"}}),
        lambda: (bad / "s2.safetensors").write_bytes(b"junk junk junk"),
    ]
    for damage in refuse:
        damage()
        with pytest.raises(CheckpointError):
            Store.open(bad)
        assert open_files() == before
