"""What a request took: as text, as JSON, and as a picture of memory over time. No torch."""

from __future__ import annotations

from lowvram.report.history import Level, history_of
from lowvram.report.report import PhaseReport, Report, phase_rows
from lowvram.report.timing import longest_gap
from lowvram.report.write import SUFFIXES, check_report_path, write_report

__all__ = [
    "SUFFIXES",
    "Level",
    "PhaseReport",
    "Report",
    "check_report_path",
    "history_of",
    "longest_gap",
    "phase_rows",
    "write_report",
]
