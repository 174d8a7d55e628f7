"""`quant`: quantize a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import completion
from .shell import (
    DATA,
    MACHINE,
    OUTPUT,
    RECIPE,
    ComputeFormat,
    Debug,
    Device,
    Effort,
    Json,
    LogFile,
    LogLevel,
    LogLevelFlag,
    OnBadSample,
    Quiet,
    TrueFalse,
    TrustRemoteCode,
    argument,
    flag,
    print_json,
    required,
    results,
    run_with_progress,
    same_as,
)

if TYPE_CHECKING:
    from ..report import Report, TuningRecord
    from .live_progress import TerminalProgress


def quant(
    context: typer.Context,
    path: Annotated[str | None, argument("PATH", "Folder of the float checkpoint, or a hub name in the cache.")] = None,
    save: Annotated[str | None, argument("SAVE_PATH", "Output folder: empty, new, or of an interrupted run.")] = None,
    model_path: Annotated[str | None, same_as("PATH", "model_path")] = None,
    save_path: Annotated[str | None, same_as("SAVE_PATH", "save_path")] = None,
    model_type: Annotated[
        str | None,
        flag(
            "model_type",
            "Model type, e.g. Qwen2.5-Omni-7B. Default: derived from config.json.",
            RECIPE,
            autocompletion=completion.model_types,
        ),
    ] = None,
    quant_type: Annotated[
        str | None,
        flag(
            "quant_type",
            "w8a8, w4a16 (also awq, int4), w8a16, fp8, nf4, or a variant: w8a8_minmax, w4a16_sym. The best recipe of"
            " this type is used. Default: w8a8.",
            RECIPE,
            autocompletion=completion.quant_types,
        ),
    ] = None,
    config_path: Annotated[
        str | None,
        flag(
            "config_path",
            "Recipe: a YAML file or the name of a shipped recipe. Excludes --quant_type.",
            RECIPE,
            autocompletion=completion.recipe_names,
        ),
    ] = None,
    save_format: Annotated[
        list[str] | None,
        flag(
            "save_format",
            "Output format: ascendv1_saver, compressed_tensors, awq or bitsandbytes. Several, repeated or joined by"
            " commas, go to SAVE_PATH/FORMAT. Overrides the recipe.",
            RECIPE,
            autocompletion=completion.save_formats,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        flag(
            "dataset",
            "Path of an index.jsonl, its folder, or a .txt file with one prompt per line; or a name under lab_calib/."
            " Overrides the recipe.",
            DATA,
            autocompletion=completion.datasets,
        ),
    ] = None,
    max_samples: Annotated[
        int | None, flag("max_samples", "Use at most N samples, selected with --seed.", DATA, min=1)
    ] = None,
    on_bad_sample: Annotated[
        OnBadSample | None,
        flag("on_bad_sample", "Fail on a sample that cannot be used, or skip it. Overrides the recipe.", DATA),
    ] = None,
    seed: Annotated[int, flag("seed", "Seed for selecting samples.", DATA)] = 0,
    effort: Annotated[
        Effort | None,
        flag(
            "effort",
            "best: let the model write calibration texts of its own where samples are few and, in w4a16, tune scales,"
            " norms and biases after rounding. Takes several times as long. Overrides the recipe. Default: fast.",
            RECIPE,
        ),
    ] = None,
    compute_dtype: Annotated[
        ComputeFormat | None,
        flag(
            "compute_dtype",
            "Number format of products in the float model's forwards. auto: bfloat16 where it is faster. Overrides the"
            " recipe.",
            MACHINE,
        ),
    ] = None,
    device: Device = "auto",
    max_memory: Annotated[
        str | None,
        flag(
            "max_memory",
            "Limit the memory of the process: 6GiB, 6G, 900MB, or bytes.",
            MACHINE,
            envvar="MSMODELSLIM_MAX_MEMORY",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = TrueFalse.false,
    dry_run: Annotated[bool, flag("dry_run", "Print the plan and stop.", OUTPUT, is_flag=True)] = False,
    show_all: Annotated[
        bool, flag("all", "With --dry_run: one row per Linear instead of one per decision.", OUTPUT, is_flag=True)
    ] = False,
    overwrite: Annotated[
        bool, flag("overwrite", "Replace an existing output in SAVE_PATH.", OUTPUT, is_flag=True)
    ] = False,
    log_level: LogLevelFlag = LogLevel.info,
    quiet: Quiet = False,
    log_file: LogFile = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a checkpoint.

    An interrupted run resumes when you run the same command again. Several processes can share the work:
    torchrun --nproc_per_node N -m msmodelslim_omni quant ...
    """
    model, target = required(context, model_path=("PATH", path, model_path), save_path=("SAVE_PATH", save, save_path))
    if quant_type and config_path:
        raise typer.BadParameter("--quant_type and --config_path exclude each other; give only one")

    def check() -> None:
        from ..files import find_model_folder, read_ahead
        from .early_checks import check_quant

        check_quant(
            model, target, quant_type=quant_type, config_path=config_path, dataset=dataset, save_format=save_format,
            max_memory=max_memory,
        )  # fmt: skip
        if not dry_run:
            read_ahead(find_model_folder(model))  # in the background, during the import of torch

    def work(progress: TerminalProgress) -> None:
        from ..files import check_save_path, find_model_folder, parse_size
        from ..run import QuantRequest, prepare, run_prepared
        from ..runtime import Progress, open_team
        from .show_plan import show_plan

        with open_team(device) as team:
            request = QuantRequest(
                model_path=find_model_folder(model),
                model_type=model_type,
                device=device,
                quant_type=quant_type,
                config_path=config_path,
                dataset=dataset,
                max_samples=max_samples,
                on_bad_sample=None if on_bad_sample is None else on_bad_sample.value,
                effort=None if effort is None else effort.value,
                compute_dtype=None if compute_dtype is None else compute_dtype.value,
                save_format=tuple(save_format or ()),
                seed=seed,
                trust_remote_code=trust_remote_code is TrueFalse.true,
                max_memory=None if max_memory is None else parse_size(max_memory),
            )
            shown = progress if team.is_leader else Progress()
            if str(request.model_path) != str(Path(model)):
                shown.say(f"model {request.model_path}, from the local hub cache")
            check_save_path(Path(target), request.model_path)
            prepared = prepare(request, shown, team, check_later=not dry_run)
            if dry_run:
                if team.is_leader:
                    show_plan(prepared, as_json, show_all)
                return
            report = run_prepared(prepared, Path(target), overwrite=overwrite, progress=shown)
            progress.close()
            if team.is_leader:
                _show_report(report, as_json)

    def stopped() -> str:
        from ..files import WORK_FOLDER

        if (Path(target) / WORK_FOLDER).is_dir():
            return f"run the same command again to continue; finished layers are in {target}"
        return "nothing was written; run the same command again to start"

    run_with_progress(
        check,
        work,
        debug,
        stopped=stopped,
        can_share=True,
        as_json=as_json,
        log_level=log_level,
        quiet=quiet,
        log_file=log_file,
    )


def _show_report(report: Report, as_json: bool) -> None:
    from ..report import (
        RUN_MEMORY_COLUMNS,
        human_bytes,
        next_steps,
        part_errors,
        peak_text,
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
    on_device = peak_text(report.peak_device_bytes, report.expected_device_bytes)
    rows = [
        ["bits per quantized weight, scales included", f"{report.bits_per_weight:.3f}"],
        *([["KL before and after tuning", _tuned(report.tuning)]] if report.tuning is not None else []),
        ["time of the run, without start and checks", f"{report.seconds:.1f} s"],
        ["peak memory", peak_text(report.peak_rss_bytes, report.expected_rss_bytes)],
        *([["peak device memory", on_device]] if report.peak_device_bytes else []),
    ]
    results.print(table("Result", ["item", "value"], rows, numeric=1))
    for saver, folder in report.savers.items():
        results.print(f"output {saver}: {folder}", soft_wrap=True, markup=False)
    results.print(f"report: {page if page.is_file() else page.with_suffix('.md')}", soft_wrap=True, markup=False)
    for saver in report.savers:
        for line in next_steps(report, saver):
            results.print(line, soft_wrap=True, markup=False)


def _tuned(tuning: TuningRecord) -> str:
    return f"{tuning.kl[0]:.4g} → {tuning.kl[tuning.epoch]:.4g}"
