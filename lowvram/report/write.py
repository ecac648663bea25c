"""A report as a file: `.png`, `.html` or `.json`, by its suffix."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

from lowvram.errors import LowVRAMError, UsageError
from lowvram.offload import format_size
from lowvram.report.report import Report

SUFFIXES = (".png", ".html", ".json")


def check_report_path(path: str) -> Path:
    """The path, if a report can be written there.

    Raises:
        UsageError: another suffix, a folder that is not there, or a folder itself.
    """
    found = Path(path)
    if found.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"--report {path}: wanted a name that ends in {', '.join(SUFFIXES)}, which says what "
            "to write"
        )
    if not found.parent.is_dir():
        raise UsageError(f"--report {path}: there is no folder {found.parent}")
    if found.is_dir():
        raise UsageError(f"--report {path}: is a folder; wanted the name of a file")
    return found


def write_report(report: Report, path: str | Path) -> None:
    """Write the report there: the picture, a page with picture and tables, or all numbers.

    Raises:
        UsageError, LowVRAMError: a path that does not do, or cannot be written.
    """
    target = check_report_path(str(path))
    suffix = target.suffix.lower()
    if suffix == ".json":
        data = (json.dumps(report.to_json(history=True), indent=1) + "\n").encode()
    else:
        from lowvram.report.picture import draw_png

        png = draw_png(report)
        data = png if suffix == ".png" else page(report, png).encode()
    try:
        target.write_bytes(data)
    except OSError as error:
        raise LowVRAMError(f"cannot write {target}: {error.strerror}") from error


def page(report: Report, png: bytes) -> str:
    """One HTML file that needs no other."""
    title = html.escape(f"{report.model} on {report.device}" if report.model else "a request")
    picture = base64.b64encode(png).decode()
    rows = "".join(
        f"<tr><td>{html.escape(phase.name)}<td>{phase.seconds:.2f}"
        f"<td>{format_size(phase.predicted_peak_bytes)}"
        f"<td>{format_size(phase.measured_peak_bytes)}"
        for phase in report.phases
    )
    numbers = json.dumps(report.to_json(history=True)).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Memory: {title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2em auto; max-width: 1600px }}
img {{ width: 100% }}
table {{ border-collapse: collapse; margin: 1em 0 }}
td, th {{ padding: .2em 1.2em .2em 0; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
th {{ border-bottom: 1px solid #999 }}
pre {{ white-space: pre-wrap }}
</style>
<img alt="Memory over time by module, with the budget and the predicted peaks"
 src="data:image/png;base64,{picture}">
<table><tr><th>phase<th>seconds<th>predicted peak<th>measured peak{rows}</table>
<pre>{html.escape(str(report))}</pre>
<script type="application/json" id="report">{numbers}</script>
</html>
"""
