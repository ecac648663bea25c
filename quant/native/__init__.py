"""The compiled kernels: their C++ sources, and who builds them, once for a user. No torch."""

from __future__ import annotations

from .builder import NotBuilt, built, not_offered
from .processors import Processor, processor

__all__ = ["NotBuilt", "Processor", "built", "not_offered", "processor"]
