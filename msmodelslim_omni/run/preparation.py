"""Every step before the first weight is read: device, recipe, checkpoint, plan, dataset, forecast, fingerprint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from ..calibration import (
    CalibSet,
    describe_media,
    load_calib_set,
    missing_modality_warnings,
    same_media_warnings,
)
from ..errors import QuantError
from ..files import file_digest, find_model_folder, value_digest
from ..models import ModelSpec, derive_model_type, find_model_type
from ..plan import QuantPlan, card_memory, fit_budget, fit_card, make_plan, refuse_quantized
from ..recipe import LinearQuantConfig, ProcessorConfig, Recipe, find_recipe, resolve_recipe
from ..report import human_bytes
from ..runtime import (
    FLOAT32,
    SINGLE_PROCESS,
    Device,
    Extent,
    Precision,
    Progress,
    Team,
    device_memory,
    resolve_device,
)
from ..storage import open_checkpoint
from ..tuning import refuse_effort
from .forecast import Forecast, assumed_extent, forecast
from .keep_limits import check_keep
from .request import QuantRequest
from .summary import versions

# The default formats of W8A8: on Ascend devices, and elsewhere.
ASCEND_FORMAT, ELSEWHERE_FORMAT = "ascendv1_saver", "compressed_tensors"


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start: everything is checked, except what `check_later` postpones; nothing is computed.

    team: the processes that share the run. precision: of the float model's forwards, chosen when the run starts.
    """

    request: QuantRequest
    plan: QuantPlan
    device: Device
    calib: CalibSet | None
    forecast: Forecast
    team: Team = SINGLE_PROCESS
    precision: Precision = FLOAT32


def prepare(
    request: QuantRequest,
    progress: Progress | None = None,
    team: Team = SINGLE_PROCESS,
    *,
    check_later: bool = False,
) -> Prepared:
    """Run every check that needs no weights: device, recipe, checkpoint, plan, dataset, memory.

    check_later: postpone the check of the whole checkpoint, see make_plan; `run_prepared` does it. Raises QuantError.
    """
    progress = progress or Progress()
    device = resolve_device(request.device, team.local_rank)
    progress.say(f"device {device.name} ({device.reason})")
    named = find_model_type(request.model_type) if request.model_type else None
    refuse_quantized(request.model_path)  # first: an Ascend checkpoint has no weight file of the expected name
    checkpoint = open_checkpoint(request.model_path)
    model = named or derive_model_type(checkpoint.config)
    if named is None:
        progress.say(f"model type {model.model_type}, derived from config.json")
    recipe = choose_recipe(model, request.quant_type, request.config_path)
    progress.say(f"recipe {recipe.path}")
    plan = make_plan(
        recipe,
        model,
        checkpoint,
        save_formats=request.save_format or _default_formats(request, recipe, device, progress),
        dataset=request.dataset,
        max_samples=request.max_samples,
        on_bad_sample=request.on_bad_sample,
        effort=request.effort,
        compute_dtype=request.compute_dtype,
        seed=request.seed,
        trust_remote_code=request.trust_remote_code,
        check_later=check_later,
    )
    check_keep(plan)
    for warning in plan.warnings:
        progress.say(f"warning: {warning}")
    if plan.calibration.effort == "best":
        refuse_effort(plan, team.size)
    calib = _load_calibration(plan)
    if calib is not None:
        found = describe_media(calib)
        progress.say(f"{len(calib.samples)} samples with {f'{found} (distinct files)' if found else 'text alone'}")
        for warning in calib.warnings:
            progress.say(f"warning: {warning}")
    extent = assumed_extent(plan, calib)
    if request.max_memory is not None:
        plan = fit_budget(plan, extent, request.max_memory)
    plan = _fit_card(plan, extent, device, progress)
    if extent.modalities == 1:
        plan = replace(plan, budget=replace(plan.budget, towers=0))  # text only: the towers are never read
    return Prepared(request, plan, device, calib, forecast(plan, extent), team)


def _fit_card(plan: QuantPlan, extent: Extent, device: Device, progress: Progress) -> QuantPlan:
    """The plan with a budget that fits the card's memory; a warning if less is free than the run needs."""
    memory = device_memory(device.torch)
    if memory is None:
        return plan
    free, total = memory
    plan = fit_card(plan, extent, total)
    if (needed := card_memory(plan, extent)) > free:
        progress.say(
            f"warning: about {human_bytes(needed)} are needed on {device.name}, and {human_bytes(free)} of"
            f" {human_bytes(total)} are free"
        )
    return plan


def choose_recipe(model: ModelSpec, quant_type: str | None, config_path: str | None) -> Recipe:
    """The requested recipe, w8a8 by default. Raises QuantError where both a type and a recipe are given."""
    if quant_type and config_path:
        raise QuantError("--quant_type and --config_path exclude each other", "give one of them")
    if config_path:
        return resolve_recipe(config_path)
    return find_recipe(model.model_type, quant_type or "w8a8")


def check_recipe(recipe: Recipe, model_path: str | Path) -> list[str]:
    """Check a recipe against a float checkpoint. Returns the warnings of its plan; raises QuantError for an error."""
    checkpoint = open_checkpoint(find_model_folder(model_path))
    plan = make_plan(recipe, derive_model_type(checkpoint.config), checkpoint)
    check_keep(plan)
    return list(plan.warnings)


def _default_formats(request: QuantRequest, recipe: Recipe, device: Device, progress: Progress) -> tuple[str, ...]:
    """The format of a run that names neither a format nor a recipe; empty: the recipe's.

    The shipped W8A8 recipes save for vLLM-Ascend, which only Ascend devices run. Elsewhere the same integers are saved
    for vLLM and transformers. W4A8 has no other format.
    """
    of_ascend = [saver.type for saver in recipe.spec.save] == [ASCEND_FORMAT] and recipe.spec.kv_cache is None
    of_ascend = of_ascend and not any(_rounds_to_w4a8(config) for _, config in recipe.processors())
    if request.config_path is not None or device.is_ascend or not of_ascend:
        return ()
    progress.say(f"format {ELSEWHERE_FORMAT}, for vLLM and transformers; --save_format {ASCEND_FORMAT}: vLLM-Ascend")
    return (ELSEWHERE_FORMAT,)


def _rounds_to_w4a8(config: ProcessorConfig) -> bool:
    if not isinstance(config, LinearQuantConfig):
        return False
    return config.qconfig.weight.dtype == "int4" and config.qconfig.weight.scope == "per_channel"


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
    missing = missing_modality_warnings(calib.samples, plan.model.modalities, "calibration does not see such inputs")
    return replace(calib, warnings=(*calib.warnings, *missing, *same_media_warnings(calib)))


def _check_modality_weights(plan: QuantPlan, calib: CalibSet) -> None:
    weights = plan.calibration.modality_weights
    if isinstance(weights, str):
        return
    where = plan.recipe.where(("spec", "calibration", "modality_weights"))
    present = {modality for sample in calib.samples for modality in sample.modalities()}
    if absent := [name for name, weight in weights.items() if weight > 0 and name not in present]:
        raise QuantError(
            f"{where}: a weight for {absent[0]}, but no sample of {calib.index} has that modality; the samples have"
            f" {', '.join(sorted(present))}",
            "remove the weight, or add samples with that modality",
        )
    if not any(weights.values()):
        raise QuantError(f"{where}: all modality weights are zero", "give at least one a weight, or set `balanced`")


def fingerprint(prepared: Prepared) -> dict[str, str]:
    """Everything that the output depends on. A run resumes only from a work folder with an equal fingerprint."""
    plan, calib = prepared.plan, prepared.calib
    return {
        **versions(),
        "model_type": plan.model.model_type,
        **{key: value_digest(value) for key, value in _recipe_blocks(plan).items()},
        "save_format": ", ".join(f"{saver.type} in shards of {saver.part_file_size} GB" for saver in plan.savers),
        **_media_fingerprint(plan),
        "checkpoint": plan.checkpoint.identity()[:16],
        "dataset": calib.identity()[:16] if calib else "none",
        "seed": str(plan.seed),
        "device": prepared.device.torch.type,
        "processes": str(prepared.team.size),
    }


def _media_fingerprint(plan: QuantPlan) -> dict[str, str]:
    """The files and libraries that turn media into tokens; empty for a data-free run."""
    if plan.dataset is None:
        return {}
    files = [file for file in plan.checkpoint.other_files() if file.suffix in (".json", ".txt", ".jinja")]
    digests = {str(file): file_digest(plan.checkpoint.path / file) for file in files}
    libraries = {name: version(name) for name in ("av", "pillow", "torchvision", "qwen_omni_utils", "soxr")}
    return {"processor files": value_digest(digests), **libraries}


def _recipe_blocks(plan: QuantPlan) -> dict[str, object]:
    return {
        "recipe process": plan.recipe.model_dump(mode="json")["spec"]["process"],
        "recipe calibration": plan.calibration.model_dump(mode="json") if plan.dataset else {},
        "memory for H": (plan.budget.matrix, plan.budget.factor) if plan.statistics == "gram" else (),
    }
