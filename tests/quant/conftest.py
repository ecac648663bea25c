"""Inputs that are made once."""

from __future__ import annotations

import pytest
from decoder_layer import LAYER
from torch import Tensor


@pytest.fixture(scope="session")
def items() -> list[Tensor]:
    """Calibration items of a decoder layer; whoever changes one copies it before."""
    return LAYER.inputs(8, 96)
