"""analyze(): which Linears lose most by quantization; and a mixed recipe for a size or a KL, proved on other samples.

    one pass of the float model: damage and bytes of every unit in every scheme      sensitivity.py
 -> a choice of schemes: least damage for the bytes, or least bytes for the damage   allocation.py
 -> a recipe with the exact bytes of its result                                      mixed_recipe.py, proposal.py
 -> quantize() and evaluate() on samples kept out, a few times                       holdout.py, rounds.py

int4 and int8 beside each other are held by compressed_tensors only, hence no other format.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..calibration import Stems, load_calib_set
from ..errors import QuantError
from ..models import ModelSpec, derive_model_type, named_model_type
from ..report import human_bytes
from ..run import Prepared, QuantRequest, check_save_path, prepare, remove, versions
from ..runtime import Clock, Progress, out_of_memory_as_error, peak_rss
from ..storage import open_checkpoint
from .holdout import split_holdout, write_index
from .mixed_recipe import (
    DEFAULT_TEXT,
    FLOAT,
    W4,
    W8,
    patterns,
)
from .proposal import SCHEMES, Proposer
from .result import Analysis, units_with_half_of_damage, write_analysis
from .rounds import Judge, search
from .sensitivity import UnitSensitivity, measure_units

_WORK = ".msmodelslim_analyze"
_OUTPUTS = ("analysis.json", "analysis.md", "recipe.yaml", "calibration.jsonl", "heldout.jsonl", "model", _WORK)


def analyze(
    model_path: str | Path,
    dataset: str = "calibVideos",
    *,
    model_type: str | None = None,
    device: str = "auto",
    max_samples: int | None = None,
    target_size: int | None = None,
    max_kl: float | None = None,
    save_path: str | Path | None = None,
    eval_dataset: str | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Analysis:
    """Measure every Linear; with target_size (bytes of all files) or max_kl (nats) also choose, quantize and judge.

    save_path gets analysis.json and analysis.md; with a choice also recipe.yaml, the parts of the dataset as they were
    used, and the quantized model in `model`. Raises QuantError for whatever the user can mend; a max_kl that was not
    reached is told by `choice.satisfied`.
    """
    progress, clock = progress or Progress(), Clock()
    choosing = _check_arguments(target_size, max_kl, save_path, eval_dataset)
    checkpoint = open_checkpoint(model_path)
    model = named_model_type(model_type) if model_type else derive_model_type(checkpoint.config)
    with _work_folder(None if save_path is None else Path(save_path), Path(model_path), overwrite) as work:
        data = Data(dataset, "")
        if choosing:
            data, max_samples = _split(model, dataset, eval_dataset, max_samples, seed, work.parent.resolve()), None
        proposer = Proposer(model, checkpoint, data.calibration, _aim(target_size, max_kl))
        if target_size is not None:
            _check_target(proposer, target_size)
        (work / "int4.yaml").write_text(proposer.recipe({}), encoding="utf-8")
        request = QuantRequest(
            model_path=Path(model_path),
            model_type=model.model_type,
            device=device,
            config_path=str(work / "int4.yaml"),
            dataset=data.calibration,
            max_samples=max_samples,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        prepared = prepare(request, progress)
        with clock("sensitivity"):
            units, stems = _measured(prepared, proposer, work / "float", progress)
        choice = None
        if choosing:
            judge = Judge(request, data.evaluation, work.parent, work, progress)
            with clock("rounds"):
                choice = search(judge, proposer, units, target_size, max_kl, data.unjudged)
    unjudged = [f"no sample that judges has {name}: what it loses is not measured" for name in data.unjudged]
    analysis = Analysis(
        model_type=model.model_type,
        model_path=str(checkpoint.path),
        dataset=dataset,
        samples=len(stems),
        tokens_by_modality=stems.tokens_by_modality(),
        units=tuple(units),
        exclude=tuple(patterns(proposer.grid, [name for unit in units_with_half_of_damage(units) for name in unit.names])),
        choice=choice,
        device=prepared.device.name,
        seed=seed,
        versions=versions(),
        seconds=clock.total(),
        seconds_by_phase=clock.seconds,
        peak_rss_bytes=peak_rss(),
        warnings=(*prepared.plan.warnings, *stems.warnings, *unjudged),
    )
    if save_path is not None:
        write_analysis(analysis, Path(save_path))
    return analysis


def _check_arguments(
    target_size: int | None, max_kl: float | None, save_path: str | Path | None, eval_dataset: str | None
) -> bool:
    """Whether a recipe is to be chosen."""
    if target_size is not None and max_kl is not None:
        raise QuantError("target_size and max_kl exclude each other", "give one of them")
    if max_kl is not None and not 0 < max_kl < float("inf"):
        raise QuantError(f"max_kl is {max_kl}", "give a number of nats above zero, e.g. 0.01")
    choosing = target_size is not None or max_kl is not None
    if choosing and save_path is None:
        raise QuantError("there is no place for the recipe and its model", "give a folder with save_path")
    if eval_dataset is not None and not choosing:
        raise QuantError("eval_dataset judges a recipe, and none is asked for", "give target_size or max_kl too")
    return choosing


def _measured(
    prepared: Prepared, proposer: Proposer, folder: Path, progress: Progress
) -> tuple[list[UnitSensitivity], Stems]:
    """The units with their sizes, by falling damage of int4; and the samples that were used."""
    assert prepared.calib is not None  # int4 by GPTQ takes data
    plans = {W4.name: prepared.plan, W8.name: proposer.int8}
    with out_of_memory_as_error(prepared.device, "give fewer or shorter samples, or use --device cpu"):
        units, stems = measure_units(plans, prepared.calib, folder, prepared.device.torch, progress)
    sized = [
        replace(unit, size={s: sum(proposer.weight_size(n, s) for n in unit.names) for s in (*SCHEMES, FLOAT)})
        for unit in units
    ]
    return sorted(sized, key=lambda unit: -unit.damage[W4.name].overall), stems


def _aim(target_size: int | None, max_kl: float | None) -> str:
    if target_size is not None:
        return f"at most {human_bytes(target_size)}"
    return f"a mean KL within {max_kl:g}" if max_kl is not None else ""


def _check_target(proposer: Proposer, target_size: int) -> None:
    """Refuse what no recipe makes, before anything is computed."""
    smallest, largest = proposer.smallest(), proposer.largest()
    if target_size < smallest:
        raise QuantError(
            f"target_size is {target_size} bytes ({human_bytes(target_size)}); the smallest, every Linear in int4, is"
            f" {smallest} bytes ({human_bytes(smallest)})",
            "give at least that; what is not quantized (embedding, towers, talker) counts too",
        )
    if target_size >= largest:
        raise QuantError(
            f"target_size is {target_size} bytes ({human_bytes(target_size)}); with every Linear float it are {largest}"
            f" bytes ({human_bytes(largest)}), so that everything would stay float",
            "give less, or use the float model as it is",
        )


# --- folders and data ----------------------------------------------------------------------------------------


@contextmanager
def _work_folder(save_path: Path | None, model_path: Path, overwrite: bool) -> Iterator[Path]:
    """A folder for what is only needed on the way, deleted in the end; in save_path if there is one.

    save_path has to be empty; with `overwrite` it may hold an earlier analysis, replaced if this one ends well.
    """
    if save_path is None:
        with tempfile.TemporaryDirectory(prefix="msmodelslim-") as folder:
            yield Path(folder)
        return
    check_save_path(save_path, model_path)
    occupants = sorted(entry.name for entry in save_path.iterdir()) if save_path.is_dir() else []
    if occupants and not overwrite:
        raise QuantError(f"save_path {str(save_path)!r} is not empty", "choose another, or pass --overwrite")
    if foreign := [name for name in occupants if name not in _OUTPUTS]:
        raise QuantError(
            f"save_path {str(save_path)!r} holds {foreign[0]!r}, which is no output of analyze; --overwrite will not"
            " delete it",
            "choose another folder, or empty this one yourself",
        )
    work = save_path / _WORK
    replaced = work / "replaced"
    try:
        remove(work)
        replaced.mkdir(parents=True)
        for name in set(occupants) - {_WORK}:
            (save_path / name).rename(replaced / name)
    except OSError as error:
        raise QuantError(
            f"save_path {str(save_path)!r} cannot be written: {error.strerror or error}", "choose another folder"
        ) from error
    try:
        yield work
    except BaseException:  # what is there is of no use without the rest, and would stand in the way of the next try
        for name in set(_OUTPUTS) - {_WORK}:
            remove(save_path / name)
        for entry in replaced.iterdir():
            entry.rename(save_path / entry.name)
        remove(work)
        raise
    remove(work)


@dataclass(frozen=True)
class Data:
    """What is calibrated on, what is judged by, and the modalities of the first that the second has not."""

    calibration: str
    evaluation: str
    unjudged: tuple[str, ...] = ()


def _split(
    model: ModelSpec, dataset: str, eval_dataset: str | None, max_samples: int | None, seed: int, folder: Path
) -> Data:
    """The dataset to calibrate on, and another to judge by, else a part of the first. Both are checked whole."""
    calib = load_calib_set(dataset, DEFAULT_TEXT, model, max_samples=max_samples, seed=seed)
    modalities = [sample.modalities() for sample in calib.samples]
    if eval_dataset is not None:
        judging = load_calib_set(eval_dataset, DEFAULT_TEXT, model)
        judged = frozenset[str]().union(*(sample.modalities() for sample in judging.samples))
        rest = write_index(calib, range(len(modalities)), folder / "calibration.jsonl")
        return Data(str(rest), eval_dataset, tuple(sorted(frozenset[str]().union(*modalities) - judged)))
    held = split_holdout(modalities, seed)
    rest = write_index(calib, held.calibration, folder / "calibration.jsonl")
    return Data(str(rest), str(write_index(calib, held.held_out, folder / "heldout.jsonl")), held.unjudged)
