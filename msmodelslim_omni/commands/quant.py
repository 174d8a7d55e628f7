"""`quant`: quantize a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .shell import (
    INDEX_LIMITS,
    MEDIA_LIMITS,
    Debug,
    Device,
    Json,
    LogLevel,
    TrueFalse,
    TrustRemoteCode,
    flag,
    messages,
    print_json,
    quiet_libraries,
    results,
    run_verb,
)

if TYPE_CHECKING:
    from ..report import Report
    from ..run import Prepared


def quant(
    model_path: Annotated[Path, flag("model_path", "Folder of the float checkpoint (config.json, safetensors).")],
    save_path: Annotated[Path, flag("save_path", "Output folder: empty, new, or of an interrupted run.")],
    model_type: Annotated[
        str | None, flag("model_type", "Model type, e.g. Qwen2.5-Omni-7B. Default: derived from config.json.")
    ] = None,
    device: Device = "auto",
    quant_type: Annotated[
        str | None, flag("quant_type", "w8a8 or w4a16 (awq): use the best shipped recipe of this type. Default: w8a8.")
    ] = None,
    config_path: Annotated[
        str | None,
        flag("config_path", "Recipe: a YAML file or the name of a shipped recipe. Excludes --quant_type."),
    ] = None,
    trust_remote_code: TrustRemoteCode = TrueFalse.false,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Path of index.jsonl or its folder, or a name under lab_calib/. Overrides the recipe."
            f" {INDEX_LIMITS} {MEDIA_LIMITS}"
        ),
    ] = None,
    max_samples: Annotated[
        int | None, flag("max_samples", "Use at most N samples, selected with --seed.", min=1)
    ] = None,
    save_format: Annotated[
        list[str] | None,
        flag(
            "save_format",
            "Output format: ascendv1_saver, compressed_tensors or awq. Repeat for several, each in SAVE_PATH/FORMAT."
            " Overrides the recipe.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for selecting samples.")] = 0,
    max_memory: Annotated[
        str | None,
        flag("max_memory", "Limit the memory of the process: 6GiB, 900MB, or bytes."),
    ] = None,
    dry_run: Annotated[bool, flag("dry_run", "Print the plan and stop.", is_flag=True)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output in SAVE_PATH.")] = False,
    log_level: Annotated[LogLevel, flag("log_level", "Lowest level of messages to print.")] = LogLevel.info,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a checkpoint.

    An interrupted run resumes when you run the same command again. Several processes can share the work:
    torchrun --nproc_per_node N -m msmodelslim_omni quant ...
    """
    if quant_type and config_path:
        raise typer.BadParameter("--quant_type and --config_path exclude each other; give only one")
    from ..files import read_ahead

    if not dry_run:
        read_ahead(model_path)  # in the background, during the import of torch
    from .live_progress import TerminalProgress

    progress = TerminalProgress(messages, log_level.value)
    quiet_libraries()

    def work() -> None:
        from ..run import QuantRequest, check_save_path, prepare, run_prepared
        from ..runtime import Progress, open_team, parse_size

        with open_team(device) as team:
            request = QuantRequest(
                model_path=model_path,
                model_type=model_type,
                device=device,
                quant_type=quant_type,
                config_path=config_path,
                dataset=dataset,
                max_samples=max_samples,
                save_format=tuple(save_format or ()),
                seed=seed,
                trust_remote_code=trust_remote_code is TrueFalse.true,
                max_memory=None if max_memory is None else parse_size(max_memory),
            )
            shown = progress if team.is_leader else Progress()
            check_save_path(save_path, model_path)
            prepared = prepare(request, shown, team, check_later=not dry_run)
            if dry_run:
                if team.is_leader:
                    _show_plan(prepared, as_json)
                return
            report = run_prepared(prepared, save_path, overwrite=overwrite, progress=shown)
            progress.close()
            if team.is_leader:
                _show_report(report, as_json)

    try:
        stopped = f"run the same command again to continue; finished layers are in {save_path}"
        run_verb(work, debug, stopped=stopped, can_share=True)
    finally:
        progress.close()


def _show_plan(prepared: Prepared, as_json: bool) -> None:
    from ..report import RUN_MEMORY_COLUMNS, human_bytes, run_memory_rows
    from .tables import table

    plan, expected = prepared.plan, prepared.forecast
    linears = [
        (linear.name, list(linear.shape), linear.scheme.name if linear.scheme else "FLOAT", linear.reason)
        for linear in plan.linears
    ]
    kept = [(part.name, part.why_float, size) for part, size in plan.kept_parts()]
    if as_json:
        plan_json = {
            "model_type": plan.model.model_type,
            "recipe": str(plan.recipe.path),
            "device": prepared.device.name,
            "dataset": plan.dataset,
            "samples": len(prepared.calib.samples) if prepared.calib else 0,
            "linears": [dict(zip(("name", "shape", "scheme", "reason"), entry, strict=True)) for entry in linears],
            "kept_float": [dict(zip(("part", "why", "bytes"), entry, strict=True)) for entry in kept],
            "output_bytes": expected.output_bytes,
            "disk_bytes": expected.disk_bytes,
            "peak_memory_bytes": expected.peak_memory_bytes,
            "run_memory": asdict(expected.run_memory),
            "warnings": list(plan.warnings),
        }
        print_json(plan_json)
        return
    rows = [[name, f"{shape[0]} x {shape[1]}", scheme, reason] for name, shape, scheme, reason in linears]
    results.print(table("Linears of the decoder layers", ["Linear", "out x in", "scheme", "reason for float"], rows, 9))
    rows = [[name, why, human_bytes(size)] for name, why, size in kept]
    results.print(table("Kept float, written unchanged", ["part", "reason", "bytes"], rows, numeric=2))
    rows = [
        ["source", human_bytes(plan.checkpoint.total_bytes)],
        *([f"output {name}", human_bytes(size)] for name, size in expected.output_bytes.items()),
        ["disk space, work folder included", human_bytes(expected.disk_bytes)],
        ["peak memory of the run", human_bytes(expected.peak_memory_bytes)],
        ["calibration samples", str(len(prepared.calib.samples)) if prepared.calib else "none: data-free"],
    ]
    results.print(table("Estimates", ["item", "value"], rows, numeric=1))
    rows = run_memory_rows(expected.run_memory)
    results.print(table("Estimated memory at run time", list(RUN_MEMORY_COLUMNS), rows, numeric=1))


def _show_report(report: Report, as_json: bool) -> None:
    from ..report import (
        RUN_MEMORY_COLUMNS,
        human_bytes,
        part_errors,
        run_memory_rows,
    )
    from .tables import table

    if as_json:
        print_json(asdict(report))
        return
    rows = [[p.name, p.scheme, human_bytes(p.bytes_before), human_bytes(p.bytes_after)] for p in report.parts]
    before, after = report.source_bytes, sum(part.bytes_after for part in report.parts)
    rows.append(["total", f"{after / before:.1%} of the source", human_bytes(before), human_bytes(after)])
    results.print(table("Sizes", ["part", "scheme", "before", "after"], rows, numeric=2))
    if report.run_memory is not None:
        rows = run_memory_rows(report.run_memory)
        results.print(table("Estimated memory at run time", list(RUN_MEMORY_COLUMNS), rows, numeric=1))
    kind = "weight" if report.data_free else "output"
    rows = [[name, f"{error:.4f}"] for name, error in part_errors(report).items()]
    results.print(table(f"Relative {kind} error, RMS over the layers", ["Linear", "error"], rows, numeric=1))
    page = Path(next(iter(report.savers.values()))) / "quant_report.html"  # written only with the extra `report`
    rows = [
        ["bits per quantized weight, scales included", f"{report.bits_per_weight:.3f}"],
        ["time", f"{report.seconds:.1f} s"],
        ["peak memory", human_bytes(report.peak_rss_bytes)],
        *([["peak device memory", human_bytes(report.peak_device_bytes)]] if report.peak_device_bytes else []),
        *([saver, folder] for saver, folder in report.savers.items()),
        ["report", str(page if page.is_file() else page.with_suffix(".md"))],
    ]
    results.print(table("Result", ["item", "value"], rows, numeric=9))
