"""Memory over time as a picture: bands by module, the budget, the phases and what was predicted."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from lowvram.offload import format_size
from lowvram.report.axis import TimeAxis, byte_ticks
from lowvram.report.colours import colour, readable_on, stack, striped
from lowvram.report.history import Level, Spell, bands, label, spells

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    from lowvram.report.report import Report

    Font = FreeTypeFont | ImageFont

WIDTH, HEIGHT = 1600, 900
LEFT, TOP, BOTTOM = 120, 112, 152
LEGEND = 350
ROW, ROW_STEP = 22, 25
"""Pixels: the picture, the margins around the bands, the column of names on the right, and the
rows of numbers below."""

NARROWEST_PHASE = 128
INK, FAINT, GRID = "#1a1a1a", "#666666", "#e4e4e4"


def draw_png(report: Report) -> bytes:
    """The picture as a PNG file."""
    out = io.BytesIO()
    draw(report).save(out, "PNG", optimize=True)
    return out.getvalue()


def draw(report: Report) -> Image:
    """The picture."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    chart = _Chart(report, ImageDraw.Draw(image), image)
    chart.title()
    chart.grid()
    chart.bands()
    chart.phases()
    chart.budget()
    chart.legend()
    return image


class _Chart:
    """One picture in the making."""

    def __init__(self, report: Report, pen: ImageDraw, image: Image) -> None:
        self._report, self._pen, self._image = report, pen, image
        self._font, self._small, self._bold = _font(19), _font(17), _font(24)
        self._history: Sequence[Level] = report.history or (Level(0.0, "", {}),)
        self._end = self._history[-1].seconds
        self._right = WIDTH - LEGEND
        self._floor = HEIGHT - BOTTOM
        width = self._right - LEFT
        self._spells = spells(self._history, self._end, shortest=self._end / width * 4)
        self._time = TimeAxis(self._spells, LEFT, width, NARROWEST_PHASE)
        self._holders = bands(self._history)
        self._peak = max(level.total for level in self._history)
        predicted = max((p.predicted_peak_bytes for p in report.phases), default=0)
        highest = max(self._peak, predicted, 1)
        self._budget_shown = report.budget_bytes <= 1.6 * highest
        self._top = int(1.08 * max(highest, report.budget_bytes if self._budget_shown else 0))

    def title(self) -> None:
        report = self._report
        where = f"{report.model} on {report.device}" if report.model else "Memory over time"
        self._pen.text((LEFT, 24), where, INK, self._bold)
        budget = f"budget {format_size(report.budget_bytes)}"
        if not self._budget_shown:
            budget += " (above this picture)"
        line = (
            f"measured peak {format_size(report.measured_peak_bytes)}   predicted "
            f"{format_size(report.predicted_peak_bytes)}   {budget}"
        )
        self._pen.text((LEFT, 60), line, FAINT, self._font)

    def grid(self) -> None:
        for tick in byte_ticks(self._top):
            y = self._y(tick)
            self._pen.line((LEFT, y, self._right, y), GRID)
            text = format_size(tick) if tick else "0"
            self._pen.text((LEFT - 12, y), text, FAINT, self._small, anchor="rm")

    def bands(self) -> None:
        """One column of pixels after another, each at the most that was held in its time."""
        columns = self._columns()
        areas: dict[str, list[tuple[int, int, int]]] = {holder: [] for holder in self._holders}
        for x, level in columns:
            sizes = [level.held.get(holder, 0) for holder in self._holders]
            for holder, (low, high) in zip(self._holders, stack(sizes), strict=True):
                bottom, top = self._y(low), self._y(high)
                if top < bottom:
                    areas[holder].append((x, top, bottom))
        for holder, area in areas.items():
            self._fill(holder, area)
        for holder, area in areas.items():
            self._name(holder, area)

    def _columns(self) -> list[tuple[int, Level]]:
        found: dict[int, Level] = {}
        starts = [self._time.at(level.seconds) for level in self._history]
        for level, start, stop in zip(
            self._history, starts, [*starts[1:], self._right], strict=True
        ):
            for x in range(int(start), max(int(start) + 1, int(stop))):
                if LEFT <= x < self._right and (
                    x not in found or level.total > found[x].total or x > int(start)
                ):
                    found[x] = level
        return sorted(found.items())

    def _fill(self, holder: str, area: Sequence[tuple[int, int, int]]) -> None:
        tint = colour(holder)
        for x, top, bottom in area:
            self._pen.line((x, top, x, bottom - 1), tint)
        if not striped(holder):
            return
        stripe = "#ffffff" if readable_on(tint) == "black" else "#d9d9d9"
        for x, top, bottom in area:
            for y in range(top + (-(x + top)) % 9, bottom, 9):
                self._pen.line((x, y, x, min(y + 1, bottom - 1)), stripe)

    def _name(self, holder: str, area: Sequence[tuple[int, int, int]]) -> None:
        """The band's name inside it, where it is high and wide enough for that."""
        if striped(holder):
            return
        text = label(holder)
        needed = self._font.getlength(text) + 16
        run: list[tuple[int, int, int]] = []
        widest: list[tuple[int, int, int]] = []
        for column in area:
            fits = column[2] - column[1] >= 28
            level = not run or (run[-1][0] + 1, *run[-1][1:]) == column
            run = [*run, column] if fits and level else [column] if fits else []
            widest = max(widest, run, key=len)
        if len(widest) >= needed:
            x = (widest[0][0] + widest[-1][0]) / 2
            y = (widest[0][1] + widest[0][2]) / 2
            self._pen.text((x, y), text, readable_on(colour(holder)), self._font, anchor="mm")

    def phases(self) -> None:
        """Below the bands the name, the seconds and the peak of each phase; above them a mark at
        what was predicted for it."""
        self._pen.line((LEFT, self._floor, self._right, self._floor), INK)
        peaks = {phase.name: phase for phase in self._report.phases}
        told: set[str] = set()
        for spell, left, right in self._places():
            self._pen.line((left, TOP, left, self._floor + 8), "#bdbdbd")
            if not spell.phase:
                continue
            phase = peaks.get(spell.phase)
            if phase is not None:
                y = self._y(phase.predicted_peak_bytes)
                self._pen.line((left + 1, y, right - 1, y), "white", 5)
                self._pen.line((left + 1, y, right - 1, y), INK, 2)
            lines = [spell.phase]
            if phase is not None and spell.phase not in told:
                lines.append(_seconds(phase.seconds))
                lines.append(format_size(phase.measured_peak_bytes))
                lines.append(format_size(phase.predicted_peak_bytes))
            told.add(spell.phase)
            self._centred(lines, (left + right) / 2, right - left)
        for i, text in enumerate(("phase", "time in it", "peak", "predicted")):
            place = (LEFT - 12, self._floor + ROW + ROW_STEP * i)
            self._pen.text(place, text, FAINT, self._small, anchor="rm")
        scale = "to scale" if self._time.to_scale else "short phases widened, others to scale"
        total = f"{_seconds(self._end)} from left to right; {scale}"
        self._pen.text((LEFT, HEIGHT - 20), total, FAINT, self._small, anchor="lm")

    def _places(self) -> list[tuple[Spell, float, float]]:
        bounds = self._time.bounds
        return [(spell, *ends) for spell, ends in zip(self._spells, pairwise(bounds), strict=True)]

    def _centred(self, lines: Sequence[str], x: float, room: float) -> None:
        for i, text in enumerate(lines):
            font = self._small
            if font.getlength(text) > room - 6:
                continue
            place = (x, self._floor + ROW + ROW_STEP * i)
            self._pen.text(place, text, INK, font, anchor="mm")

    def budget(self) -> None:
        if not self._budget_shown:
            return
        y = self._y(self._report.budget_bytes)
        for x in range(LEFT, self._right, 16):
            self._pen.line((x, y, min(x + 9, self._right), y), "#b00020", 3)
        text = f"budget {format_size(self._report.budget_bytes)}"
        self._pen.text((self._right - 6, y - 6), text, "#b00020", self._small, anchor="rb")

    def legend(self) -> None:
        """Every band from top to bottom with the most it had, then what the lines mean."""
        most = _most(self._history)
        x, y = self._right + 28, TOP + 8
        self._pen.text((x, y), "held, and at most", FAINT, self._small, anchor="lm")
        for holder in reversed(self._holders):
            y += 30
            box = (x, y - 9, x + 22, y + 9)
            self._pen.rectangle(box, colour(holder))
            if striped(holder):
                for shift in range(2, 40, 9):
                    self._stripe(box, shift)
            self._pen.text((x + 32, y), label(holder), INK, self._small, anchor="lm")
            size = format_size(most[holder])
            self._pen.text((WIDTH - 16, y), size, INK, self._small, anchor="rm")
        y += 40
        self._pen.line((x, y, x + 22, y), INK, 2)
        self._pen.text((x + 32, y), "predicted peak of a phase", INK, self._small, anchor="lm")

    def _stripe(self, box: tuple[float, float, float, float], shift: int) -> None:
        left, top, right, bottom = box
        for step in range(int(bottom - top) + 1):
            x = left + shift - step
            if left <= x < right:
                self._pen.line((x, top + step, x + 1, top + step), "white")

    def _y(self, nbytes: float) -> int:
        return round(self._floor - nbytes / self._top * (self._floor - TOP))


def _most(history: Sequence[Level]) -> Mapping[str, int]:
    most: dict[str, int] = {}
    for level in history:
        for holder, nbytes in level.held.items():
            most[holder] = max(most.get(holder, 0), nbytes)
    return most


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"


def _font(size: int) -> Font:
    from PIL import ImageFont

    return ImageFont.load_default(size)
