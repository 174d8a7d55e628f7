"""The `msmodelslim` command: each verb is one function, its flags are its arguments.

Exit codes: 0 done; 1 a fault named in one message with its hint; 2 wrong usage. torch is imported by the verbs that
need it only, so that `--help` and `recipes` answer at once.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .errors import QuantError

if TYPE_CHECKING:
    from .pipeline import Prepared
    from .report import Report

app = typer.Typer(
    name="msmodelslim",
    help="Quantize multimodal models, first of all Qwen2.5-Omni 3B and 7B.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
recipes_app = typer.Typer(help="The recipes: list, show, validate, schema.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

# Progress and messages go to stderr, results to stdout.
_messages = Console(stderr=True, highlight=False)
_results = Console(highlight=False)


class TrueFalse(str, Enum):
    true = "True"
    false = "False"


class LogLevel(str, Enum):
    info = "info"
    warning = "warning"
    error = "error"


# Flags have msModelSlim's underscores; hyphens are accepted too.
_EITHER_SPELLING = {"token_normalize_func": lambda token: token.replace("-", "_")}


def _flag(name: str, help_text: str, **more: Any) -> Any:
    """An option under msModelSlim's spelling."""
    return typer.Option(f"--{name}", help=help_text, **more)


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a fault.")]


@app.command(context_settings=_EITHER_SPELLING)
def quant(
    model_path: Annotated[Path, _flag("model_path", "Folder of the float checkpoint (config.json, safetensors).")],
    save_path: Annotated[Path, _flag("save_path", "Folder to write; empty, new, or that of a stopped run.")],
    model_type: Annotated[
        str | None, _flag("model_type", "e.g. Qwen2.5-Omni-7B; left out: derived from config.json.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto (npu, else cuda, else cpu), cpu, cuda[:i], npu[:i].")] = "auto",
    quant_type: Annotated[
        str | None, _flag("quant_type", "w8a8 or w4a16 (awq): the best shipped recipe of that type. Default w8a8.")
    ] = None,
    config_path: Annotated[
        str | None,
        _flag("config_path", "A recipe: a YAML file or the name of a shipped one. Excludes --quant_type."),
    ] = None,
    trust_remote_code: Annotated[
        TrueFalse,
        _flag("trust_remote_code", "Whether code from the checkpoint may run.", case_sensitive=False),
    ] = TrueFalse.false,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="index.jsonl, its folder, or a name under lab_calib/; overrides the recipe. Media: jpg png webp,"
            " wav mp3 flac m4a, mp4 mkv mov webm; at most 1 GiB, 64 megapixels, 600 s each."
        ),
    ] = None,
    max_samples: Annotated[
        int | None, _flag("max_samples", "Use at most this many samples, a seeded choice.", min=1)
    ] = None,
    save_format: Annotated[
        list[str] | None,
        _flag(
            "save_format",
            "ascendv1_saver, compressed_tensors or awq; repeat for several, each in SAVE_PATH/FORMAT. Overrides the"
            " recipe.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="For the choice of samples.")] = 0,
    dry_run: Annotated[bool, _flag("dry_run", "Print the plan and stop.", is_flag=True)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in SAVE_PATH.")] = False,
    log_level: Annotated[LogLevel, _flag("log_level", "How much to say while working.")] = LogLevel.info,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantize a checkpoint. Stopped at any moment, the same command goes on where it was."""
    if quant_type and config_path:
        raise typer.BadParameter("--quant_type and --config_path exclude each other; give one of them")
    from .terminal import TerminalProgress

    progress = TerminalProgress(_messages, log_level.value)
    # transformers' and the media libraries' own remarks are not about what the user does
    quiet_libraries()

    def work() -> None:
        from .pipeline import prepare, run_guarded
        from .workspace import check_save_path

        check_save_path(save_path, model_path)
        prepared = prepare(
            model_path,
            model_type=model_type,
            device=device,
            quant_type=quant_type,
            config_path=config_path,
            dataset=dataset,
            max_samples=max_samples,
            save_format=save_format or (),
            seed=seed,
            trust_remote_code=trust_remote_code is TrueFalse.true,
            progress=progress,
        )
        if dry_run:
            _show_plan(prepared, as_json)
            return
        report = run_guarded(prepared, save_path, overwrite=overwrite, progress=progress)
        progress.close()
        _show_report(report, as_json)

    try:
        _guarded(work, debug, stopped=f"run the same command again to go on; the work so far is in {save_path}")
    finally:
        progress.close()


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a float or quantized checkpoint.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What is in a checkpoint: parts, dtypes, bytes, scheme."""

    def work() -> None:
        from .inspection import inspect_checkpoint
        from .report import human_bytes
        from .terminal import table

        found = inspect_checkpoint(path)
        if as_json:
            _print_json({**asdict(found), "bytes": found.nbytes})
            return
        rows = [
            [
                part.name,
                part.scheme,
                ", ".join(f"{dtype} {human_bytes(size)}" for dtype, size in sorted(part.dtypes.items())),
                f"{part.tensors}",
                f"{part.parameters / 1e6:,.1f} M",
                human_bytes(part.nbytes),
            ]
            for part in found.parts
        ]
        rows.append(["total", found.scheme, f"{found.files} files", *_totals(found.parts), human_bytes(found.nbytes)])
        columns = ["part", "scheme", "dtypes", "tensors", "parameters", "bytes"]
        _results.print(table(f"{found.path}: {found.model_type}", columns, rows, numeric=3))

    quiet_libraries()
    _guarded(work, debug)


def _totals(parts: Any) -> list[str]:
    return [
        f"{sum(part.tensors for part in parts)}",
        f"{sum(part.parameters for part in parts) / 1e6:,.1f} M",
    ]


@app.command()
def doctor(
    path: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint, of ours or another tool's.")],
    source: Annotated[
        Path | None, typer.Option(help="Folder of the float checkpoint it was made from, to compare the weights too.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Whether a quantized checkpoint loads and where, or what is wrong with it. Exit 1 if anything is."""

    def work() -> None:
        from .doctor import examine

        with _messages.status("examining") as status:
            diagnosis = examine(path, source, on_check=lambda check: status.update(f"examining {check}"))
        if as_json:
            _print_json(diagnosis.as_dict())
        else:
            from .terminal import print_diagnosis

            print_diagnosis(_results, diagnosis)
        if not diagnosis.healthy:
            raise typer.Exit(1)

    quiet_libraries()
    _guarded(work, debug)


@app.command(context_settings=_EITHER_SPELLING)
def export(
    path: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint: an output of `quant`.")],
    save_path: Annotated[Path, _flag("save_path", "Folder to write; empty, new, or that of a stopped export.")],
    save_format: Annotated[str, _flag("save_format", "awq, compressed_tensors or ascendv1_saver.")],
    thinker_only: Annotated[
        bool, _flag("thinker_only", "Leave out talker and token2wav; the output answers in text only.", is_flag=True)
    ] = False,
    part_file_size: Annotated[int, _flag("part_file_size", "GB of a shard; 0: one file.", min=0)] = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in SAVE_PATH.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a quantized checkpoint in another format, without quantizing again."""
    from .terminal import TerminalProgress, table

    progress = TerminalProgress(_messages)
    quiet_libraries()

    def work() -> None:
        from .export import export as run_export
        from .report import human_bytes

        done = run_export(
            path, save_path, save_format, thinker_only=thinker_only, part_file_size=part_file_size, overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
        progress.close()
        if as_json:
            _print_json(asdict(done))
            return
        rows = [
            [done.source_format, done.source, human_bytes(done.source_bytes)],
            [done.save_format, done.path, human_bytes(done.output_bytes)],
            *([["left out", "talker, token2wav", human_bytes(done.left_out_bytes)]] if thinker_only else []),
        ]
        _results.print(table(f"{done.linears} quantized Linears", ["format", "folder", "bytes"], rows, numeric=2))

    try:
        _guarded(work, debug, stopped="run the same command again to go on")
    finally:
        progress.close()


@app.command(context_settings=_EITHER_SPELLING)
def generate(
    path: Annotated[Path, typer.Argument(help="Folder of a float or quantized checkpoint.")],
    text: Annotated[str, typer.Option(help="What to say or ask.")] = "",
    image: Annotated[list[str] | None, typer.Option(help="A picture: jpg png webp; repeat for more.")] = None,
    audio: Annotated[list[str] | None, typer.Option(help="A recording: wav mp3 flac m4a; repeat for more.")] = None,
    video: Annotated[
        list[str] | None, typer.Option(help="A clip: mp4 mkv mov webm, heard too if it has sound; repeat for more.")
    ] = None,
    speech: Annotated[Path | None, typer.Option(help="Answer aloud too, into this wav file (24 kHz).")] = None,
    speaker: Annotated[str, typer.Option(help="The voice; one of spk_dict.pt.")] = "Chelsie",
    max_new_tokens: Annotated[int, _flag("max_new_tokens", "The longest answer, in tokens.", min=1)] = 128,
    device: Annotated[str, typer.Option(help="auto (npu, else cuda, else cpu), cpu, cuda[:i], npu[:i].")] = "auto",
    trust_remote_code: Annotated[
        TrueFalse,
        _flag("trust_remote_code", "Whether code from the checkpoint may run.", case_sensitive=False),
    ] = TrueFalse.false,
    debug: Debug = False,
) -> None:
    """Let a checkpoint answer, in plain transformers: text on stdout as it comes, and speech.

    No quantized kernel is used: weights are dequantized and take their float size in memory (float32 on a CPU where
    that fits, else bfloat16); int8 activations are emulated. Media are local files, read as calibration reads them.
    """
    from .terminal import TerminalProgress

    progress = TerminalProgress(_messages)
    quiet_libraries()

    def show(piece: str) -> None:
        progress.close()
        typer.echo(piece, nl=False)

    def work() -> None:
        from .generate import generate as run_generate

        answer = run_generate(
            path, text, images=image or (), audios=audio or (), videos=video or (), speech=speech, speaker=speaker,
            max_new_tokens=max_new_tokens, device=device, trust_remote_code=trust_remote_code is TrueFalse.true,
            on_text=show, progress=progress,
        )  # fmt: skip
        progress.close()
        typer.echo()
        progress.say(f"{len(answer.tokens)} tokens in {answer.seconds:.1f} s, loading included")
        if answer.speech:
            progress.say(f"{answer.speech_seconds:.1f} s of speech in {answer.speech}")

    try:
        _guarded(work, debug)
    finally:
        progress.close()


# --- recipes -------------------------------------------------------------------------------------------------


@recipes_app.command("list")
def recipes_list(as_json: Json = False, debug: Debug = False) -> None:
    """The shipped recipes, best first."""

    def work() -> None:
        from .recipe import shipped_recipes
        from .terminal import table

        found = [
            {
                "name": recipe.metadata.config_id,
                "quant_type": recipe.quant_type,
                "model_types": list(recipe.metadata.verified_model_types),
                "processors": [config.type for _, config in recipe.processors()],
                "savers": [saver.type for saver in recipe.spec.save],
                "path": str(recipe.path),
            }
            for recipe in shipped_recipes()
        ]
        if as_json:
            _print_json(found)
            return
        keys = ["name", "quant_type", "model_types", "processors", "savers"]
        rows = [["\n".join(v) if isinstance(v := entry[k], list) else str(v) for k in keys] for entry in found]
        _results.print(table("Shipped recipes", keys, rows, numeric=9))

    _guarded(work, debug)


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="A recipe's name or path.")], debug: Debug = False) -> None:
    """Print a recipe's YAML."""

    def work() -> None:
        from .recipe import resolve_recipe

        typer.echo(resolve_recipe(name).text, nl=False)

    _guarded(work, debug)


@recipes_app.command("validate")
def recipes_validate(
    names: Annotated[list[str], typer.Argument(help="Recipes by path or name.")], debug: Debug = False
) -> None:
    """Check recipes; every fault with file:line."""

    def work() -> None:
        from .recipe import resolve_recipe

        for name in names:
            recipe = resolve_recipe(name)
            typer.echo(f"{recipe.path}: valid ({recipe.quant_type or 'no label'})")

    _guarded(work, debug)


@recipes_app.command("schema")
def recipes_schema(debug: Debug = False) -> None:
    """Print the JSON Schema of recipes, for editors."""

    def work() -> None:
        from .recipe import recipe_schema

        _print_json(recipe_schema())

    _guarded(work, debug)


# --- output --------------------------------------------------------------------------------------------------


def _show_plan(prepared: Prepared, as_json: bool) -> None:
    from .report import human_bytes
    from .terminal import table

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
            "warnings": list(plan.warnings),
        }
        _print_json(plan_json)
        return
    rows = [[name, f"{shape[0]} x {shape[1]}", scheme, reason] for name, shape, scheme, reason in linears]
    _results.print(table("Linears of the decoder layers", ["Linear", "out x in", "scheme", "why float"], rows, 9))
    rows = [[name, why, human_bytes(size)] for name, why, size in kept]
    _results.print(table("Kept float, written unchanged", ["part", "why", "bytes"], rows, numeric=2))
    rows = [
        ["source", human_bytes(plan.checkpoint.total_bytes)],
        *([f"output {name}", human_bytes(size)] for name, size in expected.output_bytes.items()),
        ["disk needed, work folder included", human_bytes(expected.disk_bytes)],
        ["peak memory, about", human_bytes(expected.peak_memory_bytes)],
        ["calibration samples", str(len(prepared.calib.samples)) if prepared.calib else "none: data-free"],
    ]
    _results.print(table("Forecast", ["what", "how much"], rows, numeric=1))


def _show_report(report: Report, as_json: bool) -> None:
    from .report import human_bytes, part_errors
    from .terminal import table

    if as_json:
        _print_json(asdict(report))
        return
    rows = [[p.name, p.scheme, human_bytes(p.bytes_before), human_bytes(p.bytes_after)] for p in report.parts]
    before, after = report.source_bytes, sum(part.bytes_after for part in report.parts)
    rows.append(["total", f"{after / before:.1%} of the source", human_bytes(before), human_bytes(after)])
    _results.print(table("Sizes", ["part", "scheme", "before", "after"], rows, numeric=2))
    kind = "weight" if report.data_free else "output"
    rows = [[name, f"{error:.4f}"] for name, error in part_errors(report).items()]
    _results.print(table(f"Relative {kind} error, RMS over the layers", ["Linear", "error"], rows, numeric=1))
    rows = [
        ["bits per weight, scales included", f"{report.bits_per_weight:.3f}"],
        ["time", f"{report.seconds:.1f} s"],
        ["peak memory", human_bytes(report.peak_rss_bytes)],
        *([["peak device memory", human_bytes(report.peak_device_bytes)]] if report.peak_device_bytes else []),
        *([saver, place] for saver, place in report.savers.items()),
        ["report", f"{next(iter(report.savers.values()))}/quant_report.md"],
    ]
    _results.print(table("Result", ["what", "value"], rows, numeric=9))


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


# --- faults --------------------------------------------------------------------------------------------------


def _guarded(work: Callable[[], None], debug: bool, stopped: str = "") -> None:
    """Run a verb; a fault becomes one message and exit code 1."""
    try:
        work()
    except QuantError as error:
        if debug:
            traceback.print_exc()
        _messages.print(f"[bold red]error:[/] {escape(error.message)}", soft_wrap=True)
        if error.hint:
            _messages.print(f"[bold]hint:[/] {escape(error.hint)}", soft_wrap=True)
        raise typer.Exit(1) from None
    except OSError as error:  # a path too long, a folder that may not be read
        if debug:
            traceback.print_exc()
        _messages.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        _messages.print(f"[bold]stopped[/] {escape(stopped)}", soft_wrap=True)
        raise typer.Exit(1) from None


def quiet_libraries() -> None:
    """Keep the libraries' remarks off the screen; what the user sets stands."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def main() -> None:
    """The entry point of the console script."""
    # Threads that spin while they wait for each other are several times slower on a machine that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A plug-in without its driver makes `import torch` itself fail; device.py imports plug-ins when they are asked for.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        app()
    except KeyboardInterrupt:  # outside any verb
        sys.exit(1)


if __name__ == "__main__":
    main()
