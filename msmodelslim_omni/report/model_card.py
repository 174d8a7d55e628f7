"""README.md of an output: a Hugging Face model card with what the run measured.

It holds nothing that differs from run to run (no time, no memory, no folder of this machine), so that the same command
gives the same bytes. What comes from the source's own card, config and recipe is a stranger's text: the header is
written by a YAML library, names are cut to harmless letters, and a recipe stands in a fence that it cannot close.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..files import write_aside
from ..models import ModelSpec
from ..storage import load_json_object
from .eval_report import figure_rows
from .fidelity import EvalReport
from .report import (
    Report,
    human_bytes,
    markdown_table,
    part_errors,
    root_mean_square,
)

CARD_NAME = "README.md"

# The line that says whose card it is; one without it is never changed.
_MARK = "<!-- written by msmodelslim_omni; eval renews what is between its two marks -->"
_EVALUATION = ("<!-- evaluation -->", "<!-- end of evaluation -->")
_MAX_BYTES = 1 << 20

# What a header may keep of the source's, and how it must look there.
_KEPT_KEYS = {
    "license": r"[a-z0-9.-]{1,40}",
    "license_name": r"[\w.-]{1,80}",
    "license_link": r"(https://[\w./%-]{1,300}|[\w.-]{1,80})",
    "language": r"[a-z]{2,3}",
}
# The first words of licences, for a source without a card.
_LICENSES = {
    r"Apache License\s+Version 2\.0": {"license": "apache-2.0"},
    r"MIT License": {"license": "mit"},
    r"Qwen RESEARCH LICENSE": {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE"},
}


def write_card(folder: Path, report: Report, saver: str, model: ModelSpec, recipe_text: str) -> None:
    """README.md of a finished output, in which the source's files lie already.

    A card that came with the source is kept beside it as README.source.md, unless it is one of ours.
    """
    path = folder / CARD_NAME
    before = _read(path)
    header = _header(before) or _licence(_read(folder / "LICENSE"))
    if path.is_file() and _MARK not in before:
        kept = path.with_name("README.source.md")
        while kept.exists() and _read(kept) != before:  # the same one is of a run that was stopped behind this
            kept = kept.with_name(f"{kept.stem}.source.md")
        path.replace(kept)
    base = _base_model(load_json_object(folder / "config.json"), model)
    path.write_text(make_card(report, saver, base, header, recipe_text), encoding="utf-8")


def renew_evaluation(folder: Path, evaluation: EvalReport) -> bool:
    """Put an evaluation's figures into the card of an output. False: its card is not ours, and stays as it is."""
    path = folder / CARD_NAME
    text = _read(path)
    begin, end = (text.find(mark) for mark in _EVALUATION)
    if _MARK not in text or not 0 <= begin < end:
        return False
    new = f"{text[: begin + len(_EVALUATION[0])]}\n{_evaluation(evaluation)}\n{text[end:]}"
    write_aside(path, new)
    return True


def make_card(report: Report, saver: str, base: str, header: dict[str, Any], recipe_text: str) -> str:
    """base: the float model's name on the hub, or an empty string. header: what is kept of the source's."""
    name = base.rpartition("/")[2] or _plain(Path(report.model_path).name) or _plain(report.model_type)
    schemes = _schemes(report)
    blocks = [
        f"---\n{yaml.safe_dump(_yaml_header(saver, base, header, schemes), sort_keys=False, allow_unicode=True)}---",
        _MARK,
        f"# {name}, {' and '.join(schemes)}",
        _what_it_is(report, saver, name, schemes),
        "## Figures",
        *_figures(report, saver),
        "## Evaluation",
        "\n".join((_EVALUATION[0], _NOT_EVALUATED, _EVALUATION[1])),
        "## How to load it",
        *_loading(saver, schemes),
        "## How it was made",
        *_how_made(report, saver, recipe_text),
        "## Limits",
        _LIMITS + (_GUESSED_BASE.format(base=base) if base else ""),
    ]
    return "\n\n".join(blocks) + "\n"


# --- the header ----------------------------------------------------------------------------------------------


def _yaml_header(saver: str, base: str, header: dict[str, Any], schemes: Sequence[str]) -> dict[str, Any]:
    kinds = sorted({scheme.split("_")[0].lower() for scheme in schemes})
    loads = {} if saver == "ascendv1_saver" else {"library_name": "transformers"}
    from_base = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    tags = ["msmodelslim_omni", "quantized", *kinds, saver.replace("_", "-")]
    return {**header, **loads, "pipeline_tag": "any-to-any", **from_base, "tags": tags}


def _base_model(config: dict[str, Any], model: ModelSpec) -> str:
    """The float model's name on the hub: as its config has it, else that of its published shape."""
    named = config.get("_name_or_path")
    if isinstance(named, str) and re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", named):
        return named
    shape = model.family.shape_name(config)
    return f"{model.publisher}/{shape}" if shape else ""


def _header(card: str) -> dict[str, Any]:
    """Licence and languages of a card's YAML header, as far as they look like such."""
    parts = re.match(r"---\r?\n(.*?)\n---", card, re.DOTALL)
    try:
        stored = yaml.safe_load(parts[1]) if parts else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    if not isinstance(stored, dict):
        return {}
    return {key: stored[key] for key, form in _KEPT_KEYS.items() if _fits(stored.get(key), form)}


def _fits(value: Any, form: str) -> bool:
    values = value if isinstance(value, list) else [value]
    return 0 < len(values) <= 50 and all(isinstance(v, str) and re.fullmatch(form, v) for v in values)


def _licence(text: str) -> dict[str, Any]:
    found = (header for words, header in _LICENSES.items() if re.search(words, text[:2000], re.IGNORECASE))
    return dict(next(found, {"license": "other", "license_link": "LICENSE"} if text else {}))


def _read(path: Path) -> str:
    """A text of bounded size; an empty one where there is none."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(_MAX_BYTES)


# --- what it says --------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """A name without what Markdown or HTML would read as more than letters."""
    return re.sub(r"[^\w .,+=()%-]", "?", text)[:80].strip()


def _schemes(report: Report) -> list[str]:
    found = {linear.scheme for layer in report.layers for linear in layer.linears} - {"FLOAT"}
    return [_plain(name) for name in sorted(found)] or [_plain(report.quant_type)]


def _what_it_is(report: Report, saver: str, name: str, schemes: Sequence[str]) -> str:
    kept = [_plain(part.name) for part in report.parts if part.scheme.startswith("float")]
    gone = [_plain(part.name) for part in report.parts if part.scheme == "left out"]
    return (
        f"{name} with the Linear layers of its decoder quantized ({', '.join(map(_in_words, schemes))}), written as"
        f" `{_plain(saver)}`."
        + (f" Kept as they were: {', '.join(kept)}." if kept else "")
        + (f" Left out: {', '.join(gone)}." if gone else "")
    )


def _in_words(scheme: str) -> str:
    if scheme.startswith("W8A8"):
        return "int8 weights, one scale per output channel; int8 activations, one scale per token"
    if grouped := re.fullmatch(r"W4A16_G(\d+)(_SYM)?", scheme):
        return f"int4 weights in groups of {grouped[1]}{'' if grouped[2] else ' with zero points'}; float activations"
    return scheme


def _figures(report: Report, saver: str) -> list[str]:
    """Sizes and errors. Of a report without layers the sizes before are not those of the float model."""
    if not report.layers:
        return ["The run that quantized this left no report, so no figures are known."]
    before, after = human_bytes(report.source_bytes), human_bytes(report.output_bytes[saver])
    sizes = f"Bytes of all tensors: {after}; of the float checkpoint: {before}."
    by_modality: dict[str, list[float]] = {}
    for layer in report.layers:
        for modality, error in layer.output_error_by_modality.items():
            by_modality.setdefault(modality, []).append(error)
    what = "of the weights, |W - Ŵ| / |W|" if report.data_free else "of the outputs, |Y - Ŷ| / |Y|, on calibration data"
    blocks = [sizes, f"Relative error {what}, root mean square over the layers:"]
    if by_modality:
        rows = [[_plain(m), f"{root_mean_square(errors):.4f}"] for m, errors in by_modality.items()]
        blocks.append(_table(["what a whole layer adds, by modality", "error"], rows))
    rows = [[_plain(kind), f"{error:.4f}"] for kind, error in part_errors(report).items()]
    return [*blocks, _table(["Linear", "error"], rows)]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_table(columns, rows))


_NOT_EVALUATED = """\
Not evaluated: the errors above are of single layers on calibration data. `msmodelslim eval --float FLOAT --quant THIS
--dataset DATA` compares this model with its float model and writes the figures here."""


def _evaluation(report: EvalReport) -> str:
    columns, rows = figure_rows(report)
    data = _plain(Path(report.dataset).parent.name)
    return "\n\n".join(
        [
            f"Compared with its float model on {report.samples} samples of `{data}`; scored: {_plain(report.scored)};"
            f" seed {report.seed}. In brackets: 95 % intervals over samples.",
            _table(["figure", *map(_plain, columns[1:])], rows),
            "KL: of the quantized model's next-token distribution from the float one's. Top-1, top-5: how many of the"
            " likeliest tokens agree. Exact: greedy answers that are the expected ones. Hidden, embedding: what the"
            " talker reads. `text`: samples of text alone; a sample with several media counts under each.",
        ]
    )


# What was run, and where, is in the project's README; nothing else is claimed here.
_VLLM = """\
vLLM (0.32.0, CPU build, was run on a small model of the same classes; its builds for cards were not):

```
python -m vllm.entrypoints.openai.api_server --model . --dtype bfloat16 --max-model-len 2048
```"""
_THINKER = """\
transformers with compressed-tensors, text answers (4.57.3 and 5.23.0 were run on a small model of the same classes):

```python
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(".", dtype="bfloat16")
```

The full class, `Qwen2_5OmniForConditionalGeneration`, wants besides
`quantization_config=CompressedTensorsConfig(run_compressed=False)`."""
_ZERO_POINTS = """\
transformers with compressed-tensors reads int4 with zero points from 5.23.0 on, with
`quantization_config=CompressedTensorsConfig(run_compressed=False)`."""
_AUTOAWQ = "AutoAWQ 0.2.9 with transformers 4.57.3 was run on a small model of the same classes."
_ASCEND = "vLLM-Ascend reads this format; its rules for names and shapes were checked, the runtime was not started."
_MIXED = "It holds several kinds of Linears: see which readers take that with `msmodelslim doctor .`"


def _loading(saver: str, schemes: Sequence[str]) -> list[str]:
    if len(schemes) > 1:
        return [_MIXED]
    if saver == "ascendv1_saver":
        return [_ASCEND]
    if saver == "awq":
        return [_VLLM, _AUTOAWQ]
    has_zero_points = schemes[0].startswith("W4") and not schemes[0].endswith("_SYM")
    return [_VLLM, _ZERO_POINTS if has_zero_points else _THINKER]


def _how_made(report: Report, saver: str, recipe_text: str) -> list[str]:
    if not report.layers:
        return ["With another tool, or by a run whose report is gone; this format was written from its integers."]
    recipe = f"{_plain(Path(report.recipe).stem)}.yaml"
    total = sum(report.tokens_by_modality.values())
    shares = ", ".join(f"{_plain(name)} {count / total:.1%}" for name, count in report.tokens_by_modality.items())
    data = "no data: weights alone" if report.data_free else f"{report.samples} samples, {total} tokens ({shares})"
    versions = ", ".join(f"{_plain(name)} {_plain(number)}" for name, number in report.versions.items())
    command = (
        f"msmodelslim quant --model_path FLOAT --save_path OUT --config_path {recipe} --save_format {_plain(saver)}"
        f" --seed {report.seed}"
    )
    blocks = [f"```\n{command}\n```", f"Calibration: {data}. Device: {_plain(report.device)}. Versions: {versions}."]
    if recipe_text:
        longest = max(map(len, re.findall("`+", recipe_text)), default=0)
        fence = "`" * max(3, longest + 1)
        blocks.append(f"The recipe, `{recipe}`:\n\n{fence}yaml\n{recipe_text.rstrip()}\n{fence}")
    return blocks


_LIMITS = """\
Answers differ from the float model's now and then, the more so on data unlike the calibration samples; measure on
yours before you rely on it. Nothing was trained: biases and limits of the float model are those of this one. Its
licence is the float model's."""
_GUESSED_BASE = """ \
The float model, {base}, is told by `config.json`; correct the header if this was made from a fine-tune of it."""
