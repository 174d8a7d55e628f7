"""analyze(): the sensitivity of the Linears, and a mixed recipe for a size or a KL, verified on held-out samples.

    one pass of the float model: damage and bytes of every unit in every scheme      sensitivity.py
 -> a choice of schemes: least damage for the bytes, or least bytes for the damage   allocation.py
 -> a recipe with the exact bytes of its result                                      mixed_recipe.py, proposal.py
 -> quantize() and evaluate() on held-out samples, a few rounds                      holdout.py, rounds.py

The output format is compressed_tensors, the only format that stores int4 and int8 in one checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..calibration import Stems, load_calib_set
from ..errors import QuantError, nearest
from ..files import check_save_path, find_model_folder, scratch_folder, write_atomically
from ..models import ModelSpec, derive_model_type, find_model_type
from ..plan import refuse_quantized
from ..recipe import matches, near_patterns
from ..report import INSTALL_HINT, can_write_html, human_bytes
from ..run import Prepared, QuantRequest, prepare, remove, versions
from ..runtime import Clock, Progress, out_of_memory_as_error, peak_rss
from ..storage import Checkpoint, open_checkpoint
from .holdout import split_holdout, write_index
from .mixed_recipe import (
    DEFAULT_STEPS,
    DEFAULT_TEXT,
    FLOAT,
    STEPS,
    W4,
    Grid,
    patterns,
)
from .page import HTML_NAME, as_html
from .proposal import Proposer
from .result import Analysis, Choice, missed_estimates, units_with_half_of_damage, write_analysis
from .rounds import TrialRunner, search_recipe
from .sensitivity import UnitSensitivity, measure_units
from .state import STATE_NAME, AnalysisState, changes, read_stored

_WORK = ".msmodelslim_analyze"
_OUTPUTS = (
    "analysis.json",
    "analysis.md",
    "analysis.html",
    "recipe.yaml",
    "calibration.jsonl",
    "heldout.jsonl",
    "model",
    _WORK,
)


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
    patterns: Sequence[str] = (),
    steps: Sequence[str] = DEFAULT_STEPS,
    seed: int = 0,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Analysis:
    """Measure every Linear. With target_size (bytes of all files) or max_kl (nats), also choose and test a recipe.

    patterns: as in `include` of a recipe; if given, only units with a matching Linear are measured. steps: what is
    measured between int4 and float, and may stand in a recipe: w8a8, w8a16, fp8.
    save_path: folder for analysis.json and analysis.md; with a recipe also for recipe.yaml, the indexes of the
    calibration and held-out samples, and the quantized model in `model`. If no recipe reaches max_kl,
    `choice.satisfied` is False. Raises QuantError for every fault that the user can fix.
    """
    progress, clock = progress or Progress(), Clock()
    choosing = _check_arguments(target_size, max_kl, save_path, eval_dataset, patterns)
    steps = _check_steps(steps)
    model_path = find_model_folder(model_path)
    refuse_quantized(model_path)
    checkpoint = open_checkpoint(model_path)
    model = find_model_type(model_type) if model_type else derive_model_type(checkpoint.config)
    request = QuantRequest(
        model_path=model_path, model_type=model.model_type, device=device, dataset=dataset,
        max_samples=max_samples, seed=seed, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    arguments = {
        "model_path": f"{model_path} ({checkpoint.identity()[:16]})", "model_type": model.model_type,
        "dataset": dataset, "eval_dataset": eval_dataset, "max_samples": max_samples, "target_size": target_size,
        "max_kl": max_kl, "pattern": ", ".join(patterns) or None,
        "steps": ", ".join(steps) if steps != DEFAULT_STEPS else None, "seed": seed, **versions(),
    }  # fmt: skip
    given = {name: str(value) for name, value in arguments.items() if value is not None}
    folder = None if save_path is None else Path(save_path)
    linears = _matching_linears(model, checkpoint, patterns)
    with _work_folder(folder, request.model_path, overwrite, given, progress) as (work, state):
        split = DataSplit(dataset, "")
        if choosing:
            split = _split_dataset(model, dataset, eval_dataset, max_samples, seed, work.parent.resolve())
            request = replace(request, dataset=split.calibration, max_samples=None)
        proposer = Proposer(model, checkpoint, split.calibration, _describe_target(target_size, max_kl), steps)
        if target_size is not None:
            _check_target_size(proposer, target_size)
        request = replace(request, config_path=str(_write_int4_recipe(proposer, work)))
        prepared = prepare(request, progress)
        if prepared.calib is not None:
            state.require_samples(prepared.calib.identity())
        with clock("sensitivity"):
            units, stems = _measure_sensitivity(prepared, proposer, linears, work / "float", progress, state)
        choice = None
        if choosing:
            runner = TrialRunner(request, split.evaluation, work.parent, work, progress)
            with clock("rounds"):
                choice = search_recipe(runner, proposer, units, target_size, max_kl, split.not_evaluated, state)
    analysis = _make_analysis(prepared, dataset, tuple(patterns), proposer.grid, units, stems, choice, clock)
    if save_path is not None:
        write_analysis(analysis, Path(save_path))
        _write_page(analysis, Path(save_path), progress)
    return analysis


def _write_page(analysis: Analysis, folder: Path, progress: Progress) -> None:
    """Write analysis.html, if the extra `report` is installed."""
    if can_write_html():
        write_atomically(folder / HTML_NAME, as_html(analysis))
    else:
        progress.say(INSTALL_HINT)


def _check_arguments(
    target_size: int | None,
    max_kl: float | None,
    save_path: str | Path | None,
    eval_dataset: str | None,
    patterns: Sequence[str],
) -> bool:
    """Whether to choose a recipe. Raises QuantError if the arguments contradict each other."""
    if target_size is not None and max_kl is not None:
        raise QuantError("target_size and max_kl exclude each other", "give only one")
    if max_kl is not None and not 0 < max_kl < float("inf"):
        raise QuantError(f"max_kl is {max_kl}", "give a number of nats above zero, e.g. 0.01")
    choosing = target_size is not None or max_kl is not None
    if choosing and save_path is None:
        raise QuantError("save_path is missing: the recipe and its model need a folder", "give a folder with save_path")
    if eval_dataset is not None and not choosing:
        raise QuantError(
            "eval_dataset needs a recipe to evaluate, and no recipe is requested", "give target_size or max_kl too"
        )
    if choosing and patterns:
        raise QuantError("pattern limits the ranking, and a recipe needs all units", "leave pattern out")
    return choosing


def _check_steps(given: Sequence[str]) -> tuple[str, ...]:
    """The steps in the order of STEPS, each once. Raises QuantError for an unknown one, and for none."""
    words = [word.strip().lower() for step in given for word in step.split(",")]
    if unknown := [word for word in words if word not in STEPS]:
        raise QuantError(
            f"unknown step {unknown[0]!r} between int4 and float. Known: {', '.join(STEPS)}."
            f"{nearest(unknown[0], STEPS)}",
            "choose one of them; for several, repeat the flag or join them with commas",
        )
    if not words:
        raise QuantError("no step between int4 and float is given", f"give one of {', '.join(STEPS)}")
    return tuple(step for step in STEPS if step in words)


def _matching_linears(model: ModelSpec, checkpoint: Checkpoint, patterns: Sequence[str]) -> frozenset[str]:
    """The names of the decoder's Linears that match any of the patterns; all of them without patterns.

    Raises QuantError for a pattern that matches nothing.
    """
    names = _linear_names(model, checkpoint)
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            near = near_patterns(pattern, names) or [names[0]]
            raise QuantError(
                f"pattern {pattern!r} matches no Linear of the decoder",
                f"patterns match whole names, e.g. {names[0]}; near: {', '.join(map(repr, near))}",
            )
    return frozenset(name for name in names if not patterns or matches(name, patterns))


def _linear_names(model: ModelSpec, checkpoint: Checkpoint) -> list[str]:
    spec, layers = model.family.layer_spec(checkpoint.config), model.family.num_layers(checkpoint.config)
    return [model.layer_name(layer, linear) for layer in range(layers) for linear in spec.linears]


def _describe_target(target_size: int | None, max_kl: float | None) -> str:
    """The target as text for the comment of the recipe; empty if there is none."""
    if target_size is not None:
        return f"a size of at most {human_bytes(target_size)}"
    return f"a mean KL of at most {max_kl:g}" if max_kl is not None else ""


def _check_target_size(proposer: Proposer, target_size: int) -> None:
    """Raise QuantError, before anything is computed, if no recipe can make an output of this size."""
    smallest, largest = proposer.smallest_size(), proposer.largest_size()
    if target_size < smallest:
        raise QuantError(
            f"target_size is {target_size} bytes ({human_bytes(target_size)}); the smallest possible size, with every"
            f" Linear in int4, is {smallest} bytes ({human_bytes(smallest)})",
            "give at least the smallest size; it includes the parts that stay float (embedding, towers, talker)",
        )
    if target_size >= largest:
        raise QuantError(
            f"target_size is {target_size} bytes ({human_bytes(target_size)}); with every Linear float, the size is"
            f" {largest} bytes ({human_bytes(largest)}), so nothing would be quantized",
            "give a smaller size, or use the float model",
        )


def _write_int4_recipe(proposer: Proposer, folder: Path) -> Path:
    """Write the recipe with every Linear in int4, whose plan the sensitivity pass uses. Returns its path."""
    path = folder / "int4.yaml"
    path.write_text(proposer.recipe({}), encoding="utf-8")
    return path


def _measure_sensitivity(
    prepared: Prepared,
    proposer: Proposer,
    linears: frozenset[str],
    folder: Path,
    progress: Progress,
    state: AnalysisState,
) -> tuple[list[UnitSensitivity], Stems]:
    """The units with their sizes, by decreasing int4 damage; and the stems of the samples used."""
    assert prepared.calib is not None  # int4 by GPTQ needs data
    plans = {**proposer.plans, W4.name: prepared.plan}  # int4 is the first, whose statistics suffice for all
    with out_of_memory_as_error(prepared.device, "give fewer or shorter samples, or use --device cpu"):
        if state.layers:
            progress.say(f"the first {len(state.layers)} layers are measured")
        units, stems = measure_units(plans, prepared.calib, folder, prepared.device.torch, progress, state, linears)
    sized = [
        replace(unit, size={s: sum(proposer.weight_size(n, s) for n in unit.names) for s in (*proposer.schemes, FLOAT)})
        for unit in units
    ]
    return sorted(sized, key=lambda unit: -unit.damage[W4.name]), stems


def _make_analysis(
    prepared: Prepared,
    dataset: str,
    given_patterns: tuple[str, ...],
    grid: Grid,
    units: Sequence[UnitSensitivity],
    stems: Stems,
    choice: Choice | None,
    clock: Clock,
) -> Analysis:
    """Collect the results. units: by decreasing int4 damage."""
    plan = prepared.plan
    not_evaluated = [
        f"no evaluation sample has {name}: the accuracy loss on {name} is not measured"
        for name in (choice.unjudged if choice is not None else ())
    ]
    return Analysis(
        model_type=plan.model.model_type,
        model_path=str(plan.checkpoint.path),
        dataset=dataset,
        samples=len(stems),
        tokens_by_modality=stems.tokens_by_modality(),
        units=tuple(units),
        exclude=tuple(patterns(grid, [name for unit in units_with_half_of_damage(units) for name in unit.names])),
        choice=choice,
        device=prepared.device.name,
        seed=prepared.request.seed,
        versions=versions(),
        seconds=clock.total(),
        seconds_by_phase=clock.seconds,
        peak_rss_bytes=peak_rss(),
        warnings=(
            *plan.warnings,
            *stems.warnings,
            *not_evaluated,
            *missed_estimates(() if choice is None else choice.rounds),
        ),
        patterns=given_patterns,
    )


# --- folders and data ----------------------------------------------------------------------------------------


@contextmanager
def _work_folder(
    save_path: Path | None, model_path: Path, overwrite: bool, arguments: Mapping[str, str], progress: Progress
) -> Iterator[tuple[Path, AnalysisState]]:
    """A folder for temporary files, inside save_path if that is given, and the state of the analysis in it.

    save_path must be empty or hold an interrupted analysis with the same arguments, which is resumed. With `overwrite`
    it may contain an earlier analysis, which is replaced on success and restored on failure. Ctrl-C keeps everything
    for the next run. Raises QuantError if save_path cannot be used.
    """
    if save_path is None:
        with scratch_folder(Path(tempfile.gettempdir()), "msmodelslim_analyze_") as folder:
            yield folder, AnalysisState(None, arguments)
        return
    check_save_path(save_path, model_path)
    work = save_path / _WORK
    stored = read_stored(work)
    if stored is not None and stored["request"] == dict(arguments):
        progress.say("resuming the interrupted analysis")
        state = AnalysisState(work / STATE_NAME, arguments, stored)
    else:
        if stored is not None and not overwrite:
            raise QuantError(
                f"{work} belongs to another analysis: {changes(stored['request'], arguments)}",
                "finish that one with its own command, or pass --overwrite to start again",
            )
        _start_work_folder(save_path, overwrite)
        state = AnalysisState(work / STATE_NAME, arguments)
    try:
        yield work, state
    except KeyboardInterrupt:
        raise
    except BaseException:  # incomplete outputs are useless and would block the next run
        _restore_replaced(save_path)
        raise
    remove(work)


def _start_work_folder(save_path: Path, overwrite: bool) -> None:
    """Make an empty work folder and move what it replaces into it. Raises QuantError if save_path cannot be used."""
    work = save_path / _WORK
    if work.exists() and overwrite:
        _restore_replaced(save_path)  # the interrupted analysis may have replaced one that was finished
    occupants = sorted(entry.name for entry in save_path.iterdir()) if save_path.is_dir() else []
    if occupants and not overwrite:
        raise QuantError(f"save_path {str(save_path)!r} is not empty", "choose another folder, or pass --overwrite")
    if foreign := [name for name in occupants if name not in _OUTPUTS]:
        raise QuantError(
            f"save_path {str(save_path)!r} contains {foreign[0]!r}, which is not an output of analyze; --overwrite does"
            " not delete it",
            "choose another folder, or empty this folder yourself",
        )
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


def _restore_replaced(save_path: Path) -> None:
    """Delete the outputs of an unfinished analysis and put back what it would have replaced."""
    work = save_path / _WORK
    for name in set(_OUTPUTS) - {_WORK}:
        remove(save_path / name)
    if (work / "replaced").is_dir():
        for entry in (work / "replaced").iterdir():
            entry.rename(save_path / entry.name)
    remove(work)


@dataclass(frozen=True)
class DataSplit:
    """The datasets for calibration and evaluation. not_evaluated: modalities that only the calibration samples have."""

    calibration: str
    evaluation: str
    not_evaluated: tuple[str, ...] = ()


def _split_dataset(
    model: ModelSpec, dataset: str, eval_dataset: str | None, max_samples: int | None, seed: int, folder: Path
) -> DataSplit:
    """Split a dataset into calibration and evaluation samples, or evaluate on `eval_dataset` if given.

    Writes the indexes of the parts to `folder` and checks both datasets completely.
    """
    calib = load_calib_set(dataset, DEFAULT_TEXT, model, max_samples=max_samples, seed=seed)
    modalities = [sample.modalities() for sample in calib.samples]
    if eval_dataset is not None:
        evaluation = load_calib_set(eval_dataset, DEFAULT_TEXT, model)
        evaluated = frozenset[str]().union(*(sample.modalities() for sample in evaluation.samples))
        index = write_index(calib, range(len(modalities)), folder / "calibration.jsonl")
        return DataSplit(str(index), eval_dataset, tuple(sorted(frozenset[str]().union(*modalities) - evaluated)))
    holdout = split_holdout(modalities, seed)
    index = write_index(calib, holdout.calibration, folder / "calibration.jsonl")
    held_out_index = write_index(calib, holdout.held_out, folder / "heldout.jsonl")
    return DataSplit(str(index), str(held_out_index), holdout.not_evaluated)
