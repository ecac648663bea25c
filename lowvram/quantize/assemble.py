"""The finished folder: what is copied, the layers in larger files, the index, the side files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowvram.checkpoint import resolve
from lowvram.errors import CheckpointError
from lowvram.offload import Store
from lowvram.pocket_weights import names_of
from lowvram.quant import quantization_config
from lowvram.quantize.job import Job
from lowvram.quantize.layers import CALIBRATION
from lowvram.quantize.report import PICTURE, draw_errors, stored_report
from lowvram.quantize.shards import Entry, copied, copy_file, cut, write_shard, write_text
from lowvram.quantize.source import refuse_nan
from lowvram.quantize.work import REPORT, Workplace

INDEX = "model.safetensors.index.json"


class Assembly:
    """Puts the result together in `place.out`. Every step may be begun again."""

    def __init__(self, job: Job, place: Workplace, shard_bytes: int) -> None:
        self._job, self._place, self._shard_bytes = job, place, shard_bytes

    def copy_others(self) -> None:
        """All tensors that are not quantized, as they are.

        Raises:
            CheckpointError: one of them holds NaN.
        """
        for number, shard in enumerate(self._others()):
            path = self._aside(number)
            if not path.exists() and not list(self._place.out.glob(_name(number + 1, "*"))):
                write_shard(path, shard)

    def finish(self, record: Mapping[str, Any]) -> tuple[dict[str, Any], list[float]]:
        """Everything else; the whole is opened and checked. Returns its report, and the seconds
        that each layer took, which are no part of it.
        """
        others, finished = self._others(), self._place.finished()
        if not finished or len(finished) != self._job.source.layers:
            raise CheckpointError(
                f"{len(finished)} of {self._job.source.layers} decoder layers are quantized; "
                "nothing is written: begin anew with --overwrite"
            )
        files = [self._place.layer_file(row["layer"]) for row in finished]
        with Store(self._place.folder, files) as store:
            packed = [copied(store, store.info(name)) for name in names_of(store.names())]
            layers = cut(packed, self._shard_bytes)
            shards = [*others, *layers]
            names = [_name(i + 1, f"{len(shards):05d}") for i in range(len(shards))]
            for number, name in enumerate(names):
                path = self._place.out / name
                if not path.exists() and number < len(others):
                    os.replace(self._aside(number), path)
                elif not path.exists():
                    write_shard(path, shards[number])
        self._write_index(names, shards)
        self._write_config()
        for path in self._job.source.side_files():
            copy_file(path, self._place.out / path.name)
        report = stored_report(record, finished, self._place.saved(CALIBRATION))
        write_text(self._place.out / REPORT, json.dumps(report, indent=2) + "\n")
        draw_errors(self._place.out / PICTURE, finished)
        self._check(len(finished))
        return report, [layer["seconds"] for layer in finished]

    def _others(self) -> list[list[Entry]]:
        store = self._job.source.checkpoint.store
        infos = {info.name: info for info in self._job.source.other_tensors()}
        entries = [copied(store, infos[name], refuse_nan) for name in names_of(infos)]
        return cut(entries, self._shard_bytes)

    def _aside(self, number: int) -> Path:
        """Where a copied file waits until it is known how many there will be."""
        return self._place.out / f"copied-{number:05d}.safetensors"

    def _write_index(self, names: Sequence[str], shards: Sequence[Sequence[Entry]]) -> None:
        where = {
            entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard
        }
        total = sum(entry.nbytes for shard in shards for entry in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_text(self._place.out / INDEX, json.dumps(index, indent=2) + "\n")

    def _write_config(self) -> None:
        raw = dict(self._job.source.checkpoint.raw)
        raw["quantization_config"] = quantization_config(self._job.settings.group_size)
        text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
        write_text(self._place.out / "config.json", text)

    def _check(self, layers: int) -> None:
        """Open the result as a reader will, and count what is packed.

        Raises:
            CheckpointError: a tensor is missing, or none is packed.
        """
        made = resolve(self._place.out)
        with made.store:
            made.verify(speech=made.config.speaks)
            missing = set(self._job.source.linears) - {
                linear for linear in self._job.source.linears if made.quantized(linear)
            }
            lost = {info.name for info in self._job.source.other_tensors()} - set(
                made.store.names()
            )
        if missing or lost or not layers:
            raise CheckpointError(
                f"the result lacks {min(missing | lost)}; this is a mistake of this program: "
                "begin anew with --overwrite"
            )


def _name(number: int, of: str) -> str:
    return f"model-{number:05d}-of-{of}.safetensors"
