"""Everything before the first weight: recipe, checkpoint, plan, dataset, forecast; and what the output depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from ..calibration import CalibSet, load_calib_set
from ..errors import QuantError
from ..files import file_digest, value_digest
from ..models import ModelSpec, derive_model_type, named_model_type
from ..plan import QuantPlan, make_plan, refuse_quantized, within
from ..recipe import Recipe, find_recipe, resolve_recipe
from ..runtime import ALONE, Device, Progress, Team, resolve_device
from ..storage import open_checkpoint
from .forecast import Forecast, assumed_extent, forecast
from .summary import versions


@dataclass(frozen=True)
class Prepared:
    """A run that could start: everything checked but what `check_later` puts off, nothing computed. team: the processes
    that share it."""

    plan: QuantPlan
    device: Device
    calib: CalibSet | None
    forecast: Forecast
    team: Team = ALONE


def prepare(
    model_path: str | Path,
    *,
    model_type: str | None = None,
    device: str = "auto",
    quant_type: str | None = None,
    config_path: str | None = None,
    dataset: str | None = None,
    max_samples: int | None = None,
    save_format: Sequence[str] = (),
    seed: int = 0,
    trust_remote_code: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
    team: Team = ALONE,
    check_later: bool = False,
) -> Prepared:
    """All checks before the first weight is read: device, recipe, checkpoint, plan, dataset, forecast.

    max_memory: bytes that the process may have in memory. check_later: see make_plan; `run` makes up for it.
    """
    progress = progress or Progress()
    chosen = resolve_device(device, team.place)
    progress.say(f"device {chosen.name} ({chosen.reason})")
    named = named_model_type(model_type) if model_type else None
    refuse_quantized(Path(model_path))  # first, since one for Ascend has no weights of the name that is opened
    checkpoint = open_checkpoint(model_path)
    model = named or derive_model_type(checkpoint.config)
    if named is None:
        progress.say(f"model type {model.model_type}, derived from config.json")
    recipe = choose_recipe(model, quant_type, config_path)
    progress.say(f"recipe {recipe.path}")
    plan = make_plan(
        recipe,
        model,
        checkpoint,
        save_formats=save_format,
        dataset=dataset,
        max_samples=max_samples,
        seed=seed,
        trust_remote_code=trust_remote_code,
        check_later=check_later,
    )
    for warning in plan.warnings:
        progress.say(f"warning: {warning}")
    calib = _load_calibration(plan)
    extent = assumed_extent(plan, calib)
    if max_memory is not None:
        plan = within(plan, extent, max_memory)
    if extent.modalities == 1:
        plan = replace(plan, budget=replace(plan.budget, towers=0))  # text alone: nothing will ask for their weights
    return Prepared(plan, chosen, calib, forecast(plan, extent), team)


def choose_recipe(model: ModelSpec, quant_type: str | None, config_path: str | None) -> Recipe:
    """The recipe that is asked for; w8a8 where nothing is."""
    if quant_type and config_path:
        raise QuantError("--quant_type and --config_path exclude each other", "give one of them")
    if config_path:
        return resolve_recipe(config_path)
    return find_recipe(model.model_type, quant_type or "w8a8")


def _load_calibration(plan: QuantPlan) -> CalibSet | None:
    if plan.dataset is None:
        return None
    calib = load_calib_set(
        plan.dataset,
        plan.recipe.spec.default_text,
        plan.model,
        max_samples=plan.calibration.max_samples,
        seed=plan.seed,
        on_bad_sample=plan.calibration.on_bad_sample,
    )
    _check_modality_weights(plan, calib)
    return calib


def _check_modality_weights(plan: QuantPlan, calib: CalibSet) -> None:
    weights = plan.calibration.modality_weights
    if isinstance(weights, str):
        return
    where = plan.recipe.where(("spec", "calibration", "modality_weights"))
    present = {modality for sample in calib.samples for modality in sample.modalities()}
    if absent := [name for name, weight in weights.items() if weight > 0 and name not in present]:
        raise QuantError(
            f"{where}: a weight for {absent[0]}, which no sample of {calib.index} has; it has"
            f" {', '.join(sorted(present))}",
            "leave it out, or add samples with it",
        )
    if not any(weights.values()):
        raise QuantError(f"{where}: all modality weights are zero", "give one a weight, or say `balanced`")


def fingerprint(prepared: Prepared) -> dict[str, str]:
    """What the output depends on; a work folder with another fingerprint is not gone on with."""
    plan, calib = prepared.plan, prepared.calib
    return {
        **versions(),
        "model_type": plan.model.model_type,
        **{key: value_digest(value) for key, value in _recipe_blocks(plan).items()},
        **_media_fingerprint(plan),
        "checkpoint": plan.checkpoint.identity()[:16],
        "dataset": calib.identity()[:16] if calib else "none",
        "seed": str(plan.seed),
        "device": prepared.device.torch.type,
        "processes": str(prepared.team.size),
    }


def _media_fingerprint(plan: QuantPlan) -> dict[str, str]:
    """What turns media into tokens; nothing for a data-free run."""
    if plan.dataset is None:
        return {}
    files = [file for file in plan.checkpoint.other_files() if file.suffix in (".json", ".txt", ".jinja")]
    digests = {str(file): file_digest(plan.checkpoint.path / file) for file in files}
    libraries = {name: version(name) for name in ("av", "pillow", "torchvision", "qwen_omni_utils", "soxr")}
    return {"processor files": value_digest(digests), **libraries}


def _recipe_blocks(plan: QuantPlan) -> dict[str, object]:
    return {
        "recipe process": plan.recipe.model_dump(mode="json")["spec"]["process"],
        "save_format": [(saver.type, saver.part_file_size) for saver in plan.savers],
        "recipe calibration": plan.calibration.model_dump(mode="json") if plan.dataset else {},
        "memory for H": (plan.budget.matrix, plan.budget.factor) if plan.statistics == "gram" else (),
    }
