"""Device selection without an accelerator."""

from __future__ import annotations

import torch

from msmodelslim_omni.runtime.device import resolve_device


def test_float32_stays_float32_whatever_the_environment_allows() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    resolve_device("cpu")
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
