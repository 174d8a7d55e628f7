"""README.md of an output: a Hugging Face model card with the figures of the run.

The card has no times, memory figures or local folders, so the same command writes the same bytes. Text from the
source's card, config and recipe is untrusted: a YAML library writes the header, names lose unsafe characters, and the
recipe is in a code fence that the recipe's text cannot close.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..files import write_atomically
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

# Marks a card as written by this package; cards without it are never changed.
_MARK = "<!-- written by msmodelslim_omni; eval renews what is between its two marks -->"
_EVALUATION = ("<!-- evaluation -->", "<!-- end of evaluation -->")
_MAX_BYTES = 1 << 20

# Header keys that are copied from the source's card, and the pattern that their values must match.
_COPIED_KEYS = {
    "license": r"[a-z0-9.-]{1,40}",
    "license_name": r"[\w.-]{1,80}",
    "license_link": r"(https://[\w./%-]{1,300}|[\w.-]{1,80})",
    "language": r"[a-z]{2,3}",
}
# Opening words of known licences, for a source without a card.
_LICENSES = {
    r"Apache License\s+Version 2\.0": {"license": "apache-2.0"},
    r"MIT License": {"license": "mit"},
    r"Qwen RESEARCH LICENSE": {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE"},
}


def write_card(folder: Path, report: Report, saver: str, model: ModelSpec, recipe_text: str) -> None:
    """Write README.md of a finished output that already holds the source's files.

    A card copied from the source is renamed to README.source.md, unless this package wrote it.
    """
    path = folder / CARD_NAME
    source_card = _read_text(path)
    header = _copied_header(source_card) or _detect_licence(_read_text(folder / "LICENSE"))
    if path.is_file() and _MARK not in source_card:
        kept = path.with_name("README.source.md")
        while kept.exists() and _read_text(kept) != source_card:  # equal text: an interrupted run renamed it before
            kept = kept.with_name(f"{kept.stem}.source.md")
        path.replace(kept)
    base = _base_model(load_json_object(folder / "config.json"), model)
    path.write_text(make_card(report, saver, base, header, recipe_text), encoding="utf-8")


def update_evaluation(folder: Path, evaluation: EvalReport) -> bool:
    """Replace the evaluation section of an output's card. Return False if this package did not write the card."""
    path = folder / CARD_NAME
    text = _read_text(path)
    begin, end = (text.find(mark) for mark in _EVALUATION)
    if _MARK not in text or not 0 <= begin < end:
        return False
    updated = f"{text[: begin + len(_EVALUATION[0])]}\n{_evaluation_text(evaluation)}\n{text[end:]}"
    write_atomically(path, updated)
    return True


def make_card(report: Report, saver: str, base: str, header: dict[str, Any], recipe_text: str) -> str:
    """Return the text of a card.

    base: the float model's name on the hub, or an empty string. header: keys copied from the source's card.
    """
    name = base.rpartition("/")[2] or _plain(Path(report.model_path).name) or _plain(report.model_type)
    schemes = _schemes(report)
    blocks = [
        f"---\n{yaml.safe_dump(_yaml_header(saver, base, header, schemes), sort_keys=False, allow_unicode=True)}---",
        _MARK,
        f"# {name}, {' and '.join(schemes)}",
        _description(report, saver, name, schemes),
        "## Figures",
        *_sizes_and_errors(report, saver),
        "## Evaluation",
        "\n".join((_EVALUATION[0], _NOT_EVALUATED, _EVALUATION[1])),
        "## How to load it",
        *_loading_texts(saver, schemes),
        "## How it was made",
        *_provenance(report, saver, recipe_text),
        "## Limits",
        _LIMITS + (_INFERRED_BASE.format(base=base) if base else ""),
    ]
    return "\n\n".join(blocks) + "\n"


# --- the header ----------------------------------------------------------------------------------------------


def _yaml_header(saver: str, base: str, header: dict[str, Any], schemes: Sequence[str]) -> dict[str, Any]:
    kinds = sorted({scheme.split("_")[0].lower() for scheme in schemes})
    library = {} if saver == "ascendv1_saver" else {"library_name": "transformers"}
    base_keys = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    tags = ["msmodelslim_omni", "quantized", *kinds, saver.replace("_", "-")]
    return {**header, **library, "pipeline_tag": "any-to-any", **base_keys, "tags": tags}


def _base_model(config: dict[str, Any], model: ModelSpec) -> str:
    """Name of the float model on the hub: from its config, else inferred from its shape; empty if unknown."""
    name = config.get("_name_or_path")
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", name):
        return name
    shape = model.family.published_model_type(config)
    return f"{model.publisher}/{shape}" if shape else ""


def _copied_header(card: str) -> dict[str, Any]:
    """Licence and languages in a card's YAML header; values that do not match _COPIED_KEYS are dropped."""
    parts = re.match(r"---\r?\n(.*?)\n---", card, re.DOTALL)
    try:
        stored = yaml.safe_load(parts[1]) if parts else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    if not isinstance(stored, dict):
        return {}
    return {key: stored[key] for key, pattern in _COPIED_KEYS.items() if _matches(stored.get(key), pattern)}


def _matches(value: Any, pattern: str) -> bool:
    values = value if isinstance(value, list) else [value]
    return 0 < len(values) <= 50 and all(isinstance(v, str) and re.fullmatch(pattern, v) for v in values)


def _detect_licence(text: str) -> dict[str, Any]:
    """Header keys for the text of a LICENSE file; empty without a text."""
    matches = (header for words, header in _LICENSES.items() if re.search(words, text[:2000], re.IGNORECASE))
    return dict(next(matches, {"license": "other", "license_link": "LICENSE"} if text else {}))


def _read_text(path: Path) -> str:
    """Read at most _MAX_BYTES characters of a text file; return an empty string if it does not exist."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(_MAX_BYTES)


# --- the text ------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Replace characters that Markdown or HTML could interpret, and limit the length."""
    return re.sub(r"[^\w .,+=()%-]", "?", text)[:80].strip()


def _schemes(report: Report) -> list[str]:
    schemes = {linear.scheme for layer in report.layers for linear in layer.linears} - {"FLOAT"}
    return [_plain(name) for name in sorted(schemes)] or [_plain(report.quant_type)]


def _description(report: Report, saver: str, name: str, schemes: Sequence[str]) -> str:
    kept = [_plain(part.name) for part in report.parts if part.scheme.startswith("float")]
    omitted = [_plain(part.name) for part in report.parts if part.scheme == "left out"]
    return (
        f"{name} with quantized Linear layers in the decoder ({', '.join(map(_describe_scheme, schemes))}), in the"
        f" `{_plain(saver)}` format."
        + (f" Not quantized: {', '.join(kept)}." if kept else "")
        + (f" Omitted: {', '.join(omitted)}." if omitted else "")
    )


def _describe_scheme(scheme: str) -> str:
    if scheme.startswith("W8A8"):
        return "int8 weights, one scale per output channel; int8 activations, one scale per token"
    if scheme == "W8A16":
        return "int8 weights, one scale per output channel; float activations"
    if scheme.startswith("FP8"):
        where = "block of 128 x 128" if scheme == "FP8_BLOCK" else "output channel"
        tokens = "128 inputs of a token" if scheme == "FP8_BLOCK" else "token"
        return f"FP8 (e4m3) weights, one scale per {where}; FP8 activations, one scale per {tokens}"
    if grouped := re.fullmatch(r"W4A16_G(\d+)(_SYM)?", scheme):
        return f"int4 weights in groups of {grouped[1]}{'' if grouped[2] else ' with zero points'}; float activations"
    return scheme


def _sizes_and_errors(report: Report, saver: str) -> list[str]:
    """Blocks with sizes and errors. A report without layers does not know the sizes of the float model."""
    if not report.layers:
        return ["No figures are available: this checkpoint has no quantization report."]
    before, after = human_bytes(report.source_bytes), human_bytes(report.output_bytes[saver])
    sizes = f"Size of all tensors: {after}; of the float checkpoint: {before}."
    by_modality: dict[str, list[float]] = {}
    for layer in report.layers:
        for modality, error in layer.output_error_by_modality.items():
            by_modality.setdefault(modality, []).append(error)
    kind = "weight error |W - Ŵ| / |W|" if report.data_free else "output error |Y - Ŷ| / |Y| on calibration data"
    blocks = [sizes, f"Relative {kind}, root mean square over the layers:"]
    if by_modality:
        rows = [[_plain(m), f"{root_mean_square(errors):.4f}"] for m, errors in by_modality.items()]
        blocks.append(_table(["layer's contribution to the hidden states, by modality", "error"], rows))
    rows = [[_plain(kind), f"{error:.4f}"] for kind, error in part_errors(report).items()]
    return [*blocks, _table(["Linear", "error"], rows)]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_table(columns, rows))


_NOT_EVALUATED = """\
Not evaluated. The errors above are those of single layers on calibration data. `msmodelslim eval --float FLOAT
--quant THIS --dataset DATA` compares this model with its float model and writes the figures here."""


def _evaluation_text(report: EvalReport) -> str:
    columns, rows = figure_rows(report)
    data = _plain(Path(report.dataset).parent.name)
    return "\n\n".join(
        [
            f"Compared with its float model on {report.samples} samples of `{data}`; scored: {_plain(report.scored)};"
            f" seed {report.seed}. Brackets hold 95 % intervals over samples.",
            _table(["figure", *map(_plain, columns[1:])], rows),
            "KL: divergence between the next-token distributions of the float and the quantized model. Top-1, top-5:"
            " agreement of the most likely tokens. Exact: greedy answers that equal the expected answer. Hidden,"
            " embedding: states that the talker reads. `text`: text-only samples; a sample with several modalities"
            " counts under each.",
        ]
    )


# These texts claim only what the project's README lists as tested.
_VLLM = """\
vLLM (tested: 0.32.0, CPU build, with a small model of the same classes; not tested: builds for accelerators):

```
python -m vllm.entrypoints.openai.api_server --model . --dtype bfloat16 --max-model-len 2048
```"""
_THINKER = """\
transformers with compressed-tensors, text answers (tested: 4.57.3 and 5.23.0, with a small model of the same classes):

```python
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(".", dtype="bfloat16")
```

The full class, `Qwen2_5OmniForConditionalGeneration`, also needs
`quantization_config=CompressedTensorsConfig(run_compressed=False)`."""
_UNCOMPRESSED = """\
transformers with compressed-tensors (tested: transformers 5.17.0 with compressed-tensors 0.19.0 reads exactly these
weights, with a small model of the same classes):

```python
from transformers import CompressedTensorsConfig, Qwen2_5OmniThinkerForConditionalGeneration

uncompressed = CompressedTensorsConfig(run_compressed=False)
thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
    ".", dtype="bfloat16", quantization_config=uncompressed
)
```

vLLM reads this layout; that was not tested."""
_FP8 = "It computes in FP8 on Ada, Hopper and Blackwell cards."
_ZERO_POINTS = """\
transformers with compressed-tensors loads int4 with zero points from 5.23.0 on and needs
`quantization_config=CompressedTensorsConfig(run_compressed=False)`."""
_AUTOAWQ = "AutoAWQ 0.2.9 with transformers 4.57.3 was tested with a small model of the same classes."
_ASCEND = "vLLM-Ascend reads this format. Names and shapes follow its rules; the runtime itself was not tested."
_MIXED = "The Linears have several schemes. Run `msmodelslim doctor .` to see which runtimes support that."


def _loading_texts(saver: str, schemes: Sequence[str]) -> list[str]:
    if len(schemes) > 1:
        return [_MIXED]
    if saver == "ascendv1_saver":
        return [_ASCEND]
    if saver == "awq":
        return [_VLLM, _AUTOAWQ]
    if schemes[0].startswith("FP8"):
        return [f"{_UNCOMPRESSED} {_FP8}"]
    if schemes[0] == "W8A16":
        return [_UNCOMPRESSED]
    has_zero_points = schemes[0].startswith("W4") and not schemes[0].endswith("_SYM")
    return [_VLLM, _ZERO_POINTS if has_zero_points else _THINKER]


def _provenance(report: Report, saver: str, recipe_text: str) -> list[str]:
    if not report.layers:
        return ["Another tool quantized this model, or its report is missing. This format stores the same integers."]
    recipe = f"{_plain(Path(report.recipe).stem)}.yaml"
    total = sum(report.tokens_by_modality.values())
    shares = ", ".join(f"{_plain(name)} {count / total:.1%}" for name, count in report.tokens_by_modality.items())
    data = "none (data-free)" if report.data_free else f"{report.samples} samples, {total} tokens ({shares})"
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
Some answers differ from the float model's, more often on data unlike the calibration samples; evaluate the model on
your own data before you rely on it. Quantization involves no training: the biases and limits of the float model remain,
and its licence applies."""
_INFERRED_BASE = """ \
The float model, {base}, is inferred from `config.json`; correct the header if the source was a fine-tune of it."""
