"""From the text of a flag to its value; what is none is told with the flag's name before it."""

from __future__ import annotations

import argparse
import math

from lowvram.errors import UsageError
from lowvram.settings import SEEDS


def size_of(text: str) -> int:
    from lowvram.offload import parse_size

    try:
        return parse_size(text)
    except UsageError as error:  # argparse puts the flag's name in front of the message
        raise argparse.ArgumentTypeError(str(error)) from error


def device_of(text: str) -> str:
    from lowvram.offload import parse_device

    if text != "auto":
        try:
            parse_device(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return text


def number_of(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"wanted a finite number, got {text!r}")
    return value


number_of.__name__ = "number"  # what argparse calls the type in "invalid number value: 'x'"


def seed_of(text: str) -> int:
    value = int(text)
    if not 0 <= value < SEEDS:
        raise argparse.ArgumentTypeError(f"wanted 0 to 2**62 - 1, got {text!r}")
    return value


seed_of.__name__ = "int"


def count_of(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, got {text!r}")
    return value


count_of.__name__ = "int"


def blocks_of(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of numbers; wanted blocks with commas between, as in 2,2,4,8"
        ) from error


def names_of(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
