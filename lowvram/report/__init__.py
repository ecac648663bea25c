"""What a request took: as text, as JSON, and as a picture of memory over time. No torch."""

from __future__ import annotations

from lowvram.report.history import Level, history_of
from lowvram.report.listener import (
    ORDERS,
    Heard,
    Order,
    StepTimes,
    best_blocks,
    enough_codes_per_s,
    listen,
)
from lowvram.report.report import PhaseReport, Report, phase_rows
from lowvram.report.timing import longest_gap
from lowvram.report.write import SUFFIXES, check_report_path, write_report

__all__ = [
    "ORDERS",
    "SUFFIXES",
    "Heard",
    "Level",
    "Order",
    "PhaseReport",
    "Report",
    "StepTimes",
    "best_blocks",
    "check_report_path",
    "enough_codes_per_s",
    "history_of",
    "listen",
    "longest_gap",
    "phase_rows",
    "write_report",
]
