"""The plan of a run, for `quant --dry_run`: the estimates first, then the Linears grouped by equal decision."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from .shell import print_json, results
from .tables import table

if TYPE_CHECKING:
    from ..models import Part
    from ..run import Prepared

JSON_SCHEMA = 1  # version of the keys that --json prints


def show_plan(prepared: Prepared, as_json: bool, show_all: bool) -> None:
    """Print the plan. show_all: one row per Linear instead of one per decision."""
    if as_json:
        _print_as_json(prepared)
        return
    plan = prepared.plan
    _print_table("Estimates", ["", "float", "quantized", "change"], estimate_rows(prepared), numeric=1)
    decisions = [
        (linear.name, linear.scheme.name if linear.scheme else "FLOAT", linear.reason) for linear in plan.linears
    ]
    title = "Linears of the decoder layers"
    if show_all:
        shapes = {linear.name: f"{linear.shape[0]} x {linear.shape[1]}" for linear in plan.linears}
        rows = [[name, shapes[name], scheme, reason] for name, scheme, reason in decisions]
        columns = ["Linear", "out x in", "scheme", "reason for float"]
    else:
        title += " (one row each: --all; for scripts: --json)"
        rows = grouped_decisions(decisions)
        columns = ["layers", "Linears", "scheme", "reason for float"]
    if not any(row[3] for row in rows):
        rows, columns = [row[:3] for row in rows], columns[:3]
    _print_table(title, columns, rows)
    _print_table("Kept float, written unchanged", [], kept_rows(plan.kept_parts()))


def _print_table(title: str, columns: list[str], rows: list[list[str]], numeric: int = 9) -> None:
    results.print(table(title, columns, rows, numeric=numeric, framed=False))


def estimate_rows(prepared: Prepared) -> list[list[str]]:
    """Rows (item, of the float model, of the quantized model or the run, change)."""
    from ..report import human_bytes, run_memory_rows

    plan, expected, device = prepared.plan, prepared.forecast, prepared.device.name
    source = plan.checkpoint.total_bytes
    on_disk = [
        [f"checkpoint, {name}", human_bytes(source), human_bytes(size), f"{size / source - 1:+.0%}"]
        for name, size in expected.output_bytes.items()
    ]
    served = [[f"at run time: {purpose}", *sizes] for purpose, *sizes in run_memory_rows(expected.run_memory)]
    of_run = [
        *keep_rows(prepared),
        ["disk space, work folder included", human_bytes(expected.disk_bytes)],
        ["peak memory of the run", human_bytes(expected.peak_memory_bytes)],
        *([[f"peak memory on {device}", human_bytes(expected.card_bytes)]] if device != "cpu" else []),
        *(
            [f"H of the input of {group}: on disk, slower, no less accurate", human_bytes(size)]
            for group, size in expected.gram_disk_bytes.items()
        ),
        ["calibration samples", str(len(prepared.calib.samples)) if prepared.calib else "data-free"],
    ]
    return [*on_disk, *served, *([item, "", value, ""] for item, value in of_run)]


def kept_rows(parts: Sequence[tuple[Part, int]]) -> list[list[str]]:
    """Rows of one text, parts with their bytes and the reason; parts with the same reason share a row."""
    from ..report import human_bytes

    by_reason: dict[str, list[str]] = {}
    for part, size in parts:
        by_reason.setdefault(part.why_float, []).append(f"{part.name} {human_bytes(size)}")
    return [[f"{', '.join(alike)}: {reason}"] for reason, alike in by_reason.items()]


def keep_rows(prepared: Prepared) -> list[list[str]]:
    """What `keep` of the recipe may still change: rows (item, value)."""
    from ..report import human_bytes
    from ..run import keep_budget

    return [
        [
            f"more for keep, as {keep.scheme_name}",
            f"at most {keep.limits.max_share} of the weights"
            if keep.is_free
            else f"at most {human_bytes(keep_budget(prepared.plan, keep))}",
        ]
        for keep in prepared.plan.keep
    ]


def grouped_decisions(decisions: Iterable[tuple[str, str, str]]) -> list[list[str]]:
    """Rows (layers, Linears, scheme, reason) that put Linears with equal scheme and reason together.

    decisions: name, scheme and reason of each Linear. Layers with the same Linears share a row.
    """
    by_expert: dict[tuple[int, str, str], dict[int, list[str]]] = {}  # -1: the Linears that belong to no expert
    for name, scheme, reason in decisions:
        layer, expert = (_number_behind(part, name) for part in ("layers", "experts"))
        leaf = name.rsplit(".", 1)[-1].removesuffix("_proj")
        by_expert.setdefault((layer, scheme, reason), {}).setdefault(expert, []).append(leaf)
    linears = {key: _names(names) for key, names in by_expert.items()}
    layers: dict[tuple[tuple[str, ...], str, str], list[int]] = {}
    for (layer, scheme, reason), names in linears.items():
        layers.setdefault((tuple(names), scheme, reason), []).append(layer)
    return [[ranges(found), " ".join(names), scheme, why] for (names, scheme, why), found in layers.items()]


def _number_behind(part: str, name: str) -> int:
    """The number behind `.layers.` or `.experts.` in a name; -1 if there is none."""
    match = re.search(rf"\.{part}\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _names(by_expert: dict[int, list[str]]) -> list[str]:
    """Names of Linears; those of experts once for all experts that have the same."""
    names = list(by_expert.get(-1, []))
    experts: dict[tuple[str, ...], list[int]] = {}
    for expert, leaves in by_expert.items():
        if expert >= 0:
            experts.setdefault(tuple(leaves), []).append(expert)
    return [*names, *(f"experts {ranges(numbers)}: {' '.join(leaves)}" for leaves, numbers in experts.items())]


def ranges(numbers: Sequence[int]) -> str:
    """`0-2, 5` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _print_as_json(prepared: Prepared) -> None:
    from ..run import keep_budget

    plan, expected = prepared.plan, prepared.forecast
    linears = [
        {
            "name": linear.name,
            "shape": list(linear.shape),
            "scheme": linear.scheme.name if linear.scheme else "FLOAT",
            "reason": linear.reason,
        }
        for linear in plan.linears
    ]
    print_json(
        {
            "schema": JSON_SCHEMA,
            "model_type": plan.model.model_type,
            "recipe": str(plan.recipe.path),
            "device": prepared.device.name,
            "dataset": plan.dataset,
            "samples": len(prepared.calib.samples) if prepared.calib else 0,
            "distinct_media": prepared.calib.distinct_media if prepared.calib else {},
            "linears": linears,
            "kept_float": [
                {"part": part.name, "why": part.why_float, "bytes": size} for part, size in plan.kept_parts()
            ],
            "output_bytes": expected.output_bytes,
            "disk_bytes": expected.disk_bytes,
            "peak_memory_bytes": expected.peak_memory_bytes,
            **({"card_memory_bytes": expected.card_bytes} if prepared.device.name != "cpu" else {}),
            "gram_disk_bytes": expected.gram_disk_bytes,
            "run_memory": asdict(expected.run_memory),
            "keep": [
                {
                    "as": keep.scheme_name,
                    "linears": len(keep.names),
                    "max_extra_bytes": keep_budget(plan, keep),
                    "max_share": keep.limits.share if keep.is_free else None,
                }
                for keep in plan.keep
            ],
            "warnings": list(plan.warnings),
        }
    )
