"""QuantRequest: what a user asks of a quantization run, before anything is checked."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from ..runtime import ComputeDtype


@dataclass(frozen=True)
class QuantRequest:
    """The arguments of a run that decide its result.

    model_path: folder of the float checkpoint. model_type: derived from config.json when None.
    device: auto, cpu, cuda[:i] or npu[:i].
    quant_type, config_path: the recipe, by quantization type or by YAML file or shipped name; at most one of them.
    When both are None the type is w8a8.
    dataset, max_samples, on_bad_sample, effort, compute_dtype, save_format: override the recipe's.
    seed: for the choice of samples. trust_remote_code: whether code from the checkpoint may run.
    max_memory: bytes of memory that the process may use; no limit when None.
    """

    model_path: Path
    model_type: str | None = None
    device: str = "auto"
    quant_type: str | None = None
    config_path: str | None = None
    dataset: str | None = None
    max_samples: int | None = None
    on_bad_sample: Literal["fail", "skip"] | None = None
    effort: Literal["fast", "best"] | None = None
    compute_dtype: ComputeDtype | None = None
    save_format: tuple[str, ...] = ()
    seed: int = 0
    trust_remote_code: bool = False
    max_memory: int | None = None

    def flags(self) -> dict[str, str]:
        """The arguments that are not the default, as flags of the command line."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: ",".join(value) if isinstance(value, tuple) else str(value) for name, value in given.items()}
