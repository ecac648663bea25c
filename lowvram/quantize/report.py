"""What quantizing did, layer by layer: as JSON, as text, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowvram.quantize.shards import whole_file

PICTURE = "quantization.png"

_SIZE, _MARGIN, _BAR = 260, 46, 7


@dataclass(frozen=True)
class QuantizeReport:
    """The finished work.

    `job` is what the bytes of the result depend on. `layers` has a record for each decoder layer:
    `error_before` (rounding to nearest) and `error_after` on held-out tokens, None without
    calibration, and the same for each linear. `layer_seconds`: how long the search of each layer
    took; empty where the result was there already. `verification` compares both checkpoints.
    """

    destination: Path
    job: Mapping[str, Any]
    layers: Sequence[Mapping[str, Any]]
    calibration: Mapping[str, Any]
    result_bytes: int
    seconds: float
    layer_seconds: Sequence[float] = ()
    verification: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "destination": str(self.destination),
            "result_bytes": self.result_bytes,
            "seconds": self.seconds,
            "layer_seconds": list(self.layer_seconds),
            **stored_report(self.job, self.layers, self.calibration),
            **({"verification": dict(self.verification)} if self.verification else {}),
        }

    def __str__(self) -> str:
        lines = ["layer     rounded     result   seconds   worst linear"]
        known = [f"{each:.3g}" for each in self.layer_seconds] or ["-"] * len(self.layers)
        for layer, seconds in zip(self.layers, known, strict=True):
            before, after = (_error(layer[key]) for key in ("error_before", "error_after"))
            worst = max(layer["linears"], key=lambda linear: float(linear["awq_error"]))
            share = _error(worst["awq_error"])
            lines.append(
                f"{layer['layer']:5d} {before:>11} {after:>10} {seconds:>9}   "
                f"{worst['linear']} {share}"
            )
        lines.append(self._summary())
        if self.verification:
            v = self.verification
            lines.append(
                f"held out: {v['tokens']} tokens, the same next token for "
                f"{100 * v['agreement']:.1f} %, KL {v['kl']:.4g}; worst layers "
                + ", ".join(f"{row['layer']} ({row['error']:.3g})" for row in v["worst"])
            )
        return "\n".join(lines)

    def _summary(self) -> str:
        """The method, mean errors before and after it, and what a layer took."""
        pairs = [_pair(layer) for layer in self.layers]
        before, after = (sum(each) / len(pairs) for each in zip(*pairs, strict=True))
        said = f"{self.job['method']}: mean error {_error(before)} -> {_error(after)}"
        if not self.layer_seconds:
            return said
        return f"{said}, {sum(self.layer_seconds) / len(self.layer_seconds):.3g} s a layer"

    def details(self) -> str:
        """Every linear of every layer."""
        lines = ["layer  linear                   rounded     result   clipped"]
        for layer in self.layers:
            lines += [
                f"{layer['layer']:5d}  {one['linear']:20} {_error(one['rtn_error']):>11} "
                f"{_error(one['awq_error']):>10} {100 * one['clipped']:7.2f} %"
                for one in layer["linears"]
            ]
        return "\n".join(lines)


def stored_report(
    job: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], calibration: Mapping[str, Any]
) -> dict[str, Any]:
    """What lies beside the weights: the same for every run of the job, so free of times."""
    kept = [{k: v for k, v in layer.items() if k not in ("seconds", "sha256")} for layer in layers]
    return {"job": dict(job), "calibration": dict(calibration), "layers": kept}


def draw_errors(path: Path, layers: Sequence[Mapping[str, Any]]) -> None:
    """Bars for each layer: grey is the error of rounding to nearest, blue that of the result."""
    from PIL import Image, ImageDraw

    title = "held-out error of each layer: rounded (grey), result (blue)"
    rows = [_pair(layer) for layer in layers]
    needed = math.ceil(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(title))
    width = 2 * _MARGIN + max(needed, len(rows) * (2 * _BAR + 4))
    image = Image.new("RGB", (width, _SIZE), "white")
    pen = ImageDraw.Draw(image)
    floor, most = _SIZE - _MARGIN, max((max(row) for row in rows), default=0.0) or 1.0
    pen.text((_MARGIN, 10), title, "black")
    pen.line((_MARGIN, floor, width - _MARGIN, floor), "black")
    pen.text((4, _MARGIN - 6), f"{most:.2g}", "black")
    pen.text((4, floor - 6), "0", "black")
    for index, row in enumerate(rows):
        left = _MARGIN + index * (2 * _BAR + 4) + 2
        for shift, value, colour in zip((0, _BAR), row, ("#a0a0a0", "#2060c0"), strict=True):
            top = floor - value / most * (floor - _MARGIN)
            pen.rectangle((left + shift, top, left + shift + _BAR - 1, floor - 1), fill=colour)
        if index % 4 == 0:
            pen.text((left, floor + 4), str(index), "black")
    with whole_file(path) as write:
        write(_png(image))


def _png(image: Any) -> bytes:
    import io

    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _pair(layer: Mapping[str, Any]) -> tuple[float, float]:
    """The layer's errors; without calibration, the mean of its linears'."""
    if layer["error_before"] is not None and layer["error_after"] is not None:
        return float(layer["error_before"]), float(layer["error_after"])
    linears = layer["linears"]
    before, after = (
        sum(float(linear[key]) for linear in linears) / len(linears)
        for key in ("rtn_error", "awq_error")
    )
    return before, after


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
