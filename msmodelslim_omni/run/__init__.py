"""A quantization run: the loop over decoder layers, the work folder, resume, and the outputs.

pipeline.py is the file to read first. layers.py quantizes one layer after another; preparation.py does every check
that needs no weights; workspace.py makes a run resumable; assembly.py turns layers into what a format writes.
May import: tuning, calibration, report, plan, processors, statistics, formats, models, recipe, numerics, runtime,
storage, files, errors, version.
Left out on purpose: arithmetic (numerics, processors) and bytes of a format (formats).
"""

from __future__ import annotations

from ..files import WORK_FOLDER
from .assembly import float_item, in_pieces, make_job
from .damage import ChangedModels, Unit, unit_changes
from .emulation import quantized_layer, round_cache
from .keep_limits import keep_budget
from .measure import output_error, output_squares
from .outputs import Outputs
from .pipeline import quantize, run_prepared, run_request
from .preparation import Prepared, check_recipe, prepare
from .request import QuantRequest
from .save_path import check_disk_space, is_finished, remove
from .summary import bits_per_weight, memory_of, versions, written_parts
from .workspace import Workspace

__all__ = [
    "WORK_FOLDER",
    "ChangedModels",
    "Outputs",
    "Prepared",
    "QuantRequest",
    "Unit",
    "Workspace",
    "bits_per_weight",
    "check_disk_space",
    "check_recipe",
    "float_item",
    "in_pieces",
    "is_finished",
    "keep_budget",
    "make_job",
    "memory_of",
    "output_error",
    "output_squares",
    "prepare",
    "quantize",
    "quantized_layer",
    "remove",
    "round_cache",
    "run_prepared",
    "run_request",
    "unit_changes",
    "versions",
    "written_parts",
]
