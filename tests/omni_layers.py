"""Float layers of the tiny Omni, the calibration stream of a prepared run, and a relative difference."""

from __future__ import annotations

from pathlib import Path

import torch

from msmodelslim_omni.calibration.stems import prepare_stems
from msmodelslim_omni.calibration.stream import CalibrationStream
from msmodelslim_omni.models import qwen2_5_omni as omni
from msmodelslim_omni.run.preparation import Prepared
from msmodelslim_omni.runtime.progress import Progress
from msmodelslim_omni.storage.checkpoint import Checkpoint


def float_weights(checkpoint: Checkpoint, index: int) -> dict[str, torch.Tensor]:
    """The weights of one layer in float32, by name relative to the layer."""
    prefix = omni.LAYER_PREFIX.format(index=index)
    return {
        name.removeprefix(prefix): checkpoint.load(name).float()
        for name in checkpoint.tensors
        if name.startswith(prefix)
    }


def float_layer(prepared: Prepared, index: int = 0) -> torch.nn.Module:
    checkpoint = prepared.plan.checkpoint
    return omni.build_layer(checkpoint.config, index, float_weights(checkpoint, index))


def open_stream(prepared: Prepared, folder: Path) -> CalibrationStream:
    """A stream at the first layer, with its files in `folder`."""
    folder.mkdir(exist_ok=True)
    assert prepared.calib is not None
    device = torch.device("cpu")
    stems = prepare_stems(prepared.plan, prepared.calib, folder, device, Progress())
    stream = CalibrationStream(prepared.plan, stems, folder, device)
    stream.start_at(0)
    return stream


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
