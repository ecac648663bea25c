"""The operators of torch_npu as its wheels declare them, against what the tests believe.

    python tests/interop/torch_npu_schemas.py [WHEEL ...]

Without wheels those of the releases in `tests/quant/data/torch_npu_schemas.json` are downloaded
(70 MB). Nothing is installed and nothing of them runs. Exit code 1 where one declares otherwise.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

BELIEVED = Path(__file__).parents[1] / "quant" / "data" / "torch_npu_schemas.json"
DECLARED = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
PLATFORM = ("--python-version", "311", "--platform", "manylinux_2_28_x86_64")


def download(release: str, folder: Path) -> Path:
    """The wheel of one release."""
    pip = [sys.executable, "-m", "pip", "download", f"torch_npu=={release}", "--no-deps", "-q"]
    subprocess.run([*pip, "--only-binary=:all:", *PLATFORM, "-d", str(folder)], check=True)
    return next(folder.glob(f"torch_npu-{release}-*.whl"))


def declared(wheel: Path, name: str) -> str | None:
    """The operator's schema in a wheel; None if it declares none of that name."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(DECLARED).decode()
    found = re.search(rf"func: ({re.escape(name)}\(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def main(wheels: Sequence[str]) -> int:
    believed: dict[str, dict[str, str]] = json.loads(BELIEVED.read_text())["schemas"]
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(wheel) for wheel in wheels]
        for wheel in paths or [download(release, Path(folder)) for release in believed]:
            release = wheel.name.split("-")[1]
            newest = list(believed.values())[-1]
            for name, schema in believed.get(release, newest).items():
                found = declared(wheel, name)
                differing += found != schema
                print(f"{release} {name}: {'as believed' if found == schema else found}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
