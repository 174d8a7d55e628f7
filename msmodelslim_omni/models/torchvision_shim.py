"""Makes a CUDA build of torchvision importable with a CPU build of torch.

With a CPU build the wheel's compiled operators do not load, so `import torchvision` fails on the undeclared operator
`torchvision::nms`, and transformers fails with it. Image resizing, the only use here, works once the two operators are
declared. Nothing is done if torchvision can be imported or is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

_DECLARED: list[object] = []  # keeps the library handle alive, and with it the declarations

logger = logging.getLogger(__name__)


def ensure_torchvision_imports() -> None:
    """Import torchvision. If only the missing `nms` operator prevents this, declare the operators and try again."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or _DECLARED:
            raise
        import torch

        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        importlib.import_module("torchvision")
        logger.info("torchvision was built for another torch; only its resizing is used")
