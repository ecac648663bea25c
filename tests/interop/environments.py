"""The other readers, each in an environment of its own beside the one this runs in.

An environment appends the packages of the first one to its own, so that torch is installed once;
only what is named here is installed, without its requirements, and shadows the first.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

INSTALL_SECONDS = 900

_REQUESTS = ("requests", "urllib3", "certifi", "charset_normalizer")


@dataclass(frozen=True)
class Reader:
    """A library, what its environment adds, and the scripts that run there."""

    name: str
    requirements: tuple[str, ...]
    scripts: tuple[str, ...]


READERS = (
    Reader(
        "autoawq",
        (
            "autoawq==0.2.9",
            "transformers==4.52.4",
            "tokenizers==0.21.4",
            "huggingface_hub==0.36.2",
            *_REQUESTS,
        ),
        ("autoawq_files", "autoawq_search"),
    ),
    Reader(
        "gptqmodel",
        (
            "gptqmodel==7.7.0",
            "defuser==0.0.28",
            "device-smi",
            "dill",
            "logbar",
            "ninja",
            "protobuf",
            "pypcre",
            "threadpoolctl",
            "tokenicer",
            "torchao==0.18.0",
            *_REQUESTS,
        ),
        ("gptqmodel_files", "gptqmodel_search"),
    ),
    Reader(
        "compressed-tensors",
        ("compressed-tensors==0.20.0", "loguru"),
        ("compressed_tensors_files",),
    ),
    Reader(
        "auto-round",
        ("auto-round==0.16.1", "auto-round-lib==0.16.0", "py-cpuinfo", "threadpoolctl"),
        ("auto_round_files",),
    ),
    Reader(
        "mlx-lm",
        ("mlx-lm==0.32.2", "mlx==0.32.4", "mlx-cpu==0.32.4", "protobuf", "sentencepiece"),
        ("mlx_files",),
    ),
    Reader("gguf", ("gguf==0.19.0", *_REQUESTS), ("gguf_file",)),
)

LEFT_OUT = {
    "llm-compressor": "0.14 allows transformers to 5.17 only; reads AWQ by compressed-tensors' "
    "converter, which is above",
    "optimum": "has no AWQ reader of its own; transformers' is above",
    "vllm": "several gigabytes to install",
}
"""What is not tried, and why."""


class NotInstalledError(Exception):
    """An environment could not be made; the message is the reason, in one line."""


def install(reader: Reader, folder: Path) -> Path:
    """The interpreter of a reader's environment below `folder`, made if it is not there."""
    home = folder / reader.name
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    stamp = home / "requirements.txt"
    wanted = "\n".join((sys.version, *reader.requirements))
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    venv.create(home, clear=True, with_pip=False)
    base = sysconfig.get_path("purelib")
    own = sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)})
    Path(own, "shared.pth").write_text(f"import site; site.addsitedir({base!r})\n")
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", *reader.requirements]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise NotInstalledError(f"pip took over {INSTALL_SECONDS} s") from error
    if done.returncode:
        raise NotInstalledError(f"pip: {last_line(done.stderr)}")
    stamp.write_text(wanted)
    return python


def versions(reader: Reader, python: Path) -> str:
    """The installed version of what a reader is named after, and of its transformers."""
    code = (
        "from importlib.metadata import version as v; "
        f"print(v({reader.name!r}), 'transformers', v('transformers'))"
    )
    return subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
