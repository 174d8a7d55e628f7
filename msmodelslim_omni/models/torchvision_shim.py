"""Makes a torchvision built for CUDA importable beside a CPU build of torch.

The wheel's compiled operators do not load there, and its import then fails on the undeclared operator
`torchvision::nms`; transformers' own imports fail with it. Declaring the two operators is all that the resizing
we need asks for. Nothing is done where torchvision imports, or is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

_DECLARED: list[object] = []  # keeps the library handle, and with it the declarations, alive

logger = logging.getLogger(__name__)


def ensure_torchvision_imports() -> None:
    """Import torchvision; where only the missing `nms` operator stops it, declare the operators and try again."""
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
        logger.info("torchvision's compiled operators do not fit this torch; it is used for resizing only")
