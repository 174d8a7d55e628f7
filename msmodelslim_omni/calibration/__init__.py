"""Calibration samples: from index.jsonl and media files to the inputs of each decoder layer.

samples.py parses the index, media.py and clips.py decode, stems.py runs towers and embedding, stream.py walks the
samples through the layers, and layer_probe.py measures how much a changed layer differs from the float layer.
May import: plan, statistics, models, recipe, numerics, runtime, storage, files, errors.
Left out on purpose: quantization. The stream is handed a layer and does not know what was done to it.
"""

from __future__ import annotations

from .clips import sample_frames
from .ends import SampleEnds
from .layer_probe import Errors, LayerProbe, zero_errors
from .media import MediaFacts, load_audio, load_image
from .sample_store import HiddenStates, StemStore
from .samples import (
    CalibSample,
    CalibSet,
    choose_by_modality,
    describe_fault,
    describe_media,
    load_calib_set,
    missing_modality_warnings,
    parse_sample,
    prepare_sample,
    run_stem,
    same_media_warnings,
    with_system,
)
from .stems import Stems, open_processor, prepare_stems
from .stream import CalibrationStream, Captured, OutputError

__all__ = [
    "CalibSample",
    "CalibSet",
    "CalibrationStream",
    "Captured",
    "Errors",
    "HiddenStates",
    "LayerProbe",
    "MediaFacts",
    "OutputError",
    "SampleEnds",
    "StemStore",
    "Stems",
    "choose_by_modality",
    "describe_fault",
    "describe_media",
    "load_audio",
    "load_calib_set",
    "load_image",
    "missing_modality_warnings",
    "open_processor",
    "parse_sample",
    "prepare_sample",
    "prepare_stems",
    "run_stem",
    "same_media_warnings",
    "sample_frames",
    "with_system",
    "zero_errors",
]
