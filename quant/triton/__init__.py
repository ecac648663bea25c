"""The kernels for CUDA, in Triton, on 4-bit weights as an AWQ file has them and on 8-bit rows.

Nothing here imports torch or Triton before a kernel is wanted: `offered` and `tuning` serve the
planner, `products` and the modules that it launches serve a device.
"""

from __future__ import annotations

from .offered import lacking, not_offered, too_old

__all__ = ["lacking", "not_offered", "too_old"]
