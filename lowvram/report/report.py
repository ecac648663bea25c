"""What a request took: predicted against measured, phase by phase. Printable, and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lowvram.offload import format_size
from lowvram.planner.plan import Plan
from lowvram.report.history import Level


@dataclass(frozen=True, kw_only=True)
class PhaseReport:
    """One phase as it ran. Both peaks include the device's context; neither includes the guard."""

    name: str
    seconds: float
    predicted_peak_bytes: int
    measured_peak_bytes: int


MOVED = {
    "head8": "logits",
    "head4": "logits",
    "talker8": "the outputs of the Talker's last gate",
    "kv8": "keys and values",
    "vocoder16": "the outputs of a linear of the DiT",
}
"""What the error of an option is measured of."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The measured side of a `Plan`.

    Seconds count from the start of the request. `bytes_host_to_device` is what this request
    loaded; modules that were resident already cost nothing. `host_peak_bytes` is the largest
    resident set the process has had so far. `codes` counts codec tokens, 50 to a second of speech;
    `speech_cut_off` says that it has as many as it may have and did not end by itself.
    `option_errors` has the relative error that each option in effect was measured to make in this
    request: `head8` and `head4` of the logits of the prompt's last token, `talker8` of what the
    last layer's gate gives for it, `vocoder16` of the first linear of the DiT's last MLP for
    a frame of its first evaluation, all by 256 rows of the file; `kv8` of the last layer's keys and
    values of the prompt's last token, the Thinker's or the Talker's, which is larger.
    `notes` say what was done otherwise than planned, because memory ran out all the same.
    `phase_seconds` tells phases apart that interleave (`talk`, `vocode`). `longest_gap_s` is the
    longest silence of a listener who played each chunk as it came; None without speech.
    `history` is what was held by whom from the start to the end.
    """

    phases: tuple[PhaseReport, ...]
    budget_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int
    first_text_s: float | None
    first_audio_s: float | None
    total_s: float
    bytes_host_to_device: int
    host_peak_bytes: int
    prompt_tokens: int
    reply_tokens: int
    codes: int
    audio_seconds: float
    seed: int
    option_errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    model: str = ""
    device: str = ""
    history: tuple[Level, ...] = ()
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    longest_gap_s: float | None = None
    speech_cut_off: bool = False

    @property
    def timeline(self) -> tuple[tuple[float, str, int], ...]:
        """`history` in short: (seconds, phase, bytes held)."""
        return tuple((level.seconds, level.phase, level.total) for level in self.history)

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of talking and vocoding for each second of speech; None where there is none."""
        spent = sum(self.phase_seconds.get(name, 0.0) for name in ("talk", "vocode"))
        return spent / self.audio_seconds if spent and self.audio_seconds else None

    @property
    def codes_per_s(self) -> float | None:
        """Codes for each second of the Talker, its loading included; 50 are as fast as speech."""
        seconds = self.phase_seconds.get("talk")
        return self.codes / seconds if seconds and self.codes else None

    @property
    def audio_per_second(self) -> dict[str, float]:
        """Seconds of speech for each second that `talk`, and that `vocode`, took."""
        spent = {name: self.phase_seconds.get(name) for name in ("talk", "vocode")}
        return {name: self.audio_seconds / s for name, s in spent.items() if s}

    def to_json(self, *, history: bool = False) -> dict[str, Any]:
        """A JSON object with the field names above, `timeline`, `real_time_factor`, `codes_per_s`
        and `audio_per_second`; `history`, which is long, where it is asked for."""
        found = asdict(self) | {
            "real_time_factor": self.real_time_factor,
            "codes_per_s": self.codes_per_s,
            "audio_per_second": self.audio_per_second,
        }
        found["history"] = [level._asdict() for level in self.history]
        found["timeline"] = self.timeline
        if not history:
            del found["history"]
        return found

    def __str__(self) -> str:
        rows = [("phase", "seconds", "predicted", "measured", "of predicted")]
        for phase in self.phases:
            share = phase.measured_peak_bytes / max(phase.predicted_peak_bytes, 1)
            rows.append(
                (
                    phase.name,
                    f"{phase.seconds:.2f}",
                    format_size(phase.predicted_peak_bytes),
                    format_size(phase.measured_peak_bytes),
                    f"{share:.0%}",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        ended = ", cut off at its bound" if self.speech_cut_off else ""
        lines.append("")
        lines.append(
            f"{self.prompt_tokens} tokens in, {self.reply_tokens} out; "
            f"{self.audio_seconds:.2f} s of speech{ended}; "
            f"{format_size(self.bytes_host_to_device)} loaded; "
            f"process peak {format_size(self.host_peak_bytes)}"
        )
        times = [f"total {self.total_s:.2f} s"]
        if self.first_text_s is not None:
            times.append(f"first text {self.first_text_s:.2f} s")
        if self.first_audio_s is not None:
            times.append(f"first audio {self.first_audio_s:.2f} s")
        if self.real_time_factor is not None:
            times.append(f"real-time factor {self.real_time_factor:.2f}")
        lines.append("; ".join(times))
        if self.longest_gap_s is not None:
            speed = [f"{self.codes_per_s:.1f} codes a second"] if self.codes_per_s else []
            speed += [
                f"{name} {rate:.2f} s of speech a second"
                for name, rate in self.audio_per_second.items()
            ]
            lines.append("; ".join([*speed, f"longest gap {self.longest_gap_s:.2f} s"]))
        for name, error in self.option_errors.items():
            lines.append(f"{name} moves {MOVED[name]} by {error:.2%}")
        return "\n".join(lines)


def phase_rows(plan: Plan, measured: dict[str, tuple[float, int]]) -> tuple[PhaseReport, ...]:
    """One row for each phase of the plan that ran; `measured` is name -> (seconds, peak bytes)."""
    return tuple(
        PhaseReport(
            name=row.name,
            seconds=measured[row.name][0],
            predicted_peak_bytes=row.predicted_peak_bytes,
            measured_peak_bytes=measured[row.name][1],
        )
        for row in plan.phases
        if row.name in measured
    )
