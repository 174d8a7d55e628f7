"""README.md of an output: a Hugging Face model card with the figures of the run.

The card has no times, measured memory or paths of this machine, so the same command writes the same bytes. What it says
about runtimes comes from the table of compatibility. Text from the source's card, config and recipe is untrusted: a
YAML library writes the header, names lose unsafe characters, and the recipe is linked, not copied.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from ..compatibility import (
    DEQUANTIZE_NOTE,
    PROOFS,
    REPOSITORY,
    RUNTIMES,
    Loads,
    answering_class,
    class_uses,
    describe_readers,
    image_request,
    load_snippet,
    loads_in,
    serve_commands,
    speaking_class,
)
from ..files import write_atomically
from ..models import ModelSpec
from ..storage import load_json_object
from .eval_report import figure_rows, judgement
from .fidelity import EvalReport
from .kept import KeptUnit
from .report import (
    LEFT_OUT,
    Report,
    count_samples,
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
    config = load_json_object(folder / "config.json")
    cards = _cards_for_experts(report, model, config)
    base = _base_model(config, model)
    card = make_card(report, saver, model, base, header, has_recipe=bool(recipe_text), cards=cards)
    path.write_text(card, encoding="utf-8")


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


def samples_in_card(folder: Path) -> int:
    """Number of samples of the evaluation in an output's card, or 0."""
    _, begin, rest = _read_text(folder / CARD_NAME).partition(_EVALUATION[0])
    found = re.search(r"^Compared with its float model on (\d{1,9}) samples", rest.partition(_EVALUATION[1])[0], re.M)
    return int(found[1]) if begin and found else 0


def make_card(
    report: Report,
    saver: str,
    model: ModelSpec,
    base: str,
    header: dict[str, Any],
    *,
    has_recipe: bool = False,
    cards: Sequence[int] = (),
) -> str:
    """Return the text of a card.

    base: the float model's name on the hub, or an empty string. header: keys copied from the source's card. has_recipe:
    whether the output holds its recipe. cards: numbers of cards that can share the experts; empty without experts.
    """
    name = base.rpartition("/")[2] or _folder_name(report.model_path) or _plain(model.hf_model_type)
    schemes = _schemes(report)
    loads = loads_in(model.hf_model_type, saver, schemes, without_speech=_lacks_speech(report, model))
    yaml_header = yaml.safe_dump(
        _yaml_header(report, saver, model, base, header, schemes, loads), sort_keys=False, allow_unicode=True
    )
    blocks = [
        f"---\n{yaml_header}---",
        _MARK,
        f"# {name}, {' and '.join(schemes)}",
        _description(report, saver, name, schemes),
        *_headline(report, saver),
        "\n".join((_EVALUATION[0], _not_evaluated(report), _EVALUATION[1])),
        "## How to load it",
        *_loading_texts(report, model, loads),
        *([_CARDS.format(cards=", ".join(map(str, cards)))] if cards else []),
        "## How it was made",
        *_provenance(report, has_recipe),
        "## Errors of the Linears",
        *_errors(report),
        "## Limits",
        _LIMITS + (_INFERRED_BASE.format(base=base) if base else ""),
    ]
    return "\n\n".join(blocks) + "\n"


# --- the header ----------------------------------------------------------------------------------------------


def _yaml_header(
    report: Report,
    saver: str,
    model: ModelSpec,
    base: str,
    header: dict[str, Any],
    schemes: Sequence[str],
    loads: Mapping[str, Loads],
) -> dict[str, Any]:
    """The header. library_name makes the hub print a snippet, so it is set only if transformers loads the model."""
    kinds = sorted({scheme.split("_")[0].lower() for scheme in schemes})
    answering, _ = class_uses(loads)
    library = {"library_name": "transformers"} if answering else {}
    speaks = bool(model.speech_prefixes) and not _lacks_speech(report, model)
    task = "any-to-any" if speaks else "image-text-to-text"
    base_keys = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    tags = ["msmodelslim_omni", "quantized", *kinds, saver.replace("_", "-")]
    return {**header, **library, "pipeline_tag": task, **base_keys, "tags": tags}


def _lacks_speech(report: Report, model: ModelSpec) -> bool:
    """Whether the parts that speak were left out of an output of a model that can speak."""
    speech = {part.name for part in model.parts if part.prefix in model.speech_prefixes}
    return any(part.name in speech and part.scheme == LEFT_OUT for part in report.parts)


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


def _plain(text: str, length: int = 80) -> str:
    """Replace characters that Markdown or HTML could interpret, and limit the length."""
    return re.sub(r"[^\w .,+=()%-]", "?", text)[:length].strip()


# Names of folders that say nothing about the model.
_NAMELESS = {"model", "models", "checkpoint", "weights", "snapshot"}


def _folder_name(path: str) -> str:
    name = _plain(Path(path).name)
    return "" if name.lower() in _NAMELESS else name


def _schemes(report: Report) -> list[str]:
    schemes = {linear.scheme for layer in report.layers for linear in layer.linears} - {"FLOAT"}
    return [_plain(name) for name in sorted(schemes)] or [_plain(report.quant_type)]


def _description(report: Report, saver: str, name: str, schemes: Sequence[str]) -> str:
    kept = [_plain(part.name) for part in report.parts if part.scheme.startswith("float")]
    omitted = [_plain(part.name) for part in report.parts if part.scheme == LEFT_OUT]
    return (
        f"{name} with quantized Linear layers in the decoder ({', '.join(map(_describe_scheme, schemes))}), in the"
        f" `{_plain(saver)}` format."
        + (f" Not quantized: {', '.join(kept)}." if kept else "")
        + (f" Omitted: {', '.join(omitted)}." if omitted else "")
        + (f" {_CACHES[report.kv_cache]}" if report.kv_cache in _CACHES else "")
        + (f" {_kept(report.kept)}" if report.kept else "")
    )


def _kept(kept: Sequence[KeptUnit]) -> str:
    """A sentence with the units that `keep` chose."""
    floats = [_plain(unit.unit) for unit in kept if unit.scheme == "FLOAT"]
    better = [_plain(unit.unit) for unit in kept if unit.scheme != "FLOAT"]
    parts = [f"{', '.join(floats)} in float"] * bool(floats)
    parts += [f"{', '.join(better)} in {_plain(kept[-1].scheme)}"] * bool(better)
    return f"The parts that cost most accuracy for their bytes are kept in a better precision: {'; '.join(parts)}."


_CACHES = {
    "fp8": "It has scales for a KV cache in FP8, one per layer for keys and for values; vLLM uses it with"
    " `--kv-cache-dtype fp8`.",
    "int8": "It has scales for a KV cache in int8 (C8), one per channel, which vLLM-Ascend uses.",
}


def _describe_scheme(scheme: str) -> str:
    if scheme == "W4A8_DYNAMIC":
        return "int4 weights, one scale per output channel; int8 activations, one scale per token"
    if scheme.startswith("W8A8"):
        return "int8 weights, one scale per output channel; int8 activations, one scale per token"
    if scheme == "NVFP4A16":
        return "NVFP4 weights (4-bit floats, an FP8 scale per 16 inputs); float activations"
    if scheme == "NVFP4":
        return (
            "NVFP4 weights and activations (4-bit floats, an FP8 scale per 16 inputs, a calibrated global scale of the"
            " activations)"
        )
    if scheme == "W8A16":
        return "int8 weights, one scale per output channel; float activations"
    if scheme.startswith("FP8"):
        where = "block of 128 x 128" if scheme == "FP8_BLOCK" else "output channel"
        tokens = "128 inputs of a token" if scheme == "FP8_BLOCK" else "token"
        return f"FP8 (e4m3) weights, one scale per {where}; FP8 activations, one scale per {tokens}"
    if grouped := re.fullmatch(r"W4A16_G(\d+)(_SYM)?", scheme):
        return f"int4 weights in groups of {grouped[1]}{'' if grouped[2] else ' with zero points'}; float activations"
    if blocks := re.fullmatch(r"NF4_G(\d+)(_DOUBLE)?", scheme):
        return f"4-bit NormalFloat weights in blocks of {blocks[1]}; float activations"
    return scheme


def _headline(report: Report, saver: str) -> list[str]:
    """A table of the sizes that a reader compares first. A report without layers does not know the float model's."""
    if not report.layers:
        return []
    rows = [["size of all tensors", human_bytes(report.source_bytes), human_bytes(report.output_bytes[saver])]]
    if report.run_memory is not None:
        memory = report.run_memory
        # The parts are those of the run's first format; another one differs only in the Linears, which answer in text.
        text_now = memory.text_now + report.output_bytes[saver] - sum(part.bytes_after for part in report.parts)
        rows.append(
            ["memory of the weights that answer in text", human_bytes(memory.text_float), human_bytes(text_now)]
        )
    return [_table(["", "float", "quantized"], rows)]


def _cards_for_experts(report: Report, model: ModelSpec, config: dict[str, Any]) -> tuple[int, ...]:
    """Numbers of cards that can share the quantized experts; empty without quantized experts."""
    experts = r"\.experts\.\d+\."
    linears = (linear for layer in report.layers for linear in layer.linears if re.search(experts, linear.name))
    scheme = next((linear.scheme for linear in linears), "FLOAT")
    if scheme == "FLOAT":
        return ()
    grouped = re.search(r"_G(\d+)", scheme)
    size = int(grouped[1]) if grouped else {"FP8_BLOCK": 128, "NVFP4A16": 16}.get(scheme)
    return model.family.layer_spec(config).parallel_sizes(size)


_CARDS = (
    "Tensor parallelism can share the experts on these numbers of cards: {cards}. With others, add"
    " `--enable-expert-parallel`, which gives whole experts to the cards."
)


def _errors(report: Report) -> list[str]:
    """Blocks with the errors of the Linears."""
    if not report.layers:
        return ["No figures are available: this checkpoint has no quantization report."]
    by_modality: dict[str, list[float]] = {}
    for layer in report.layers:
        for modality, error in layer.output_error_by_modality.items():
            by_modality.setdefault(modality, []).append(error)
    kind = "weight error |W - Ŵ| / |W|" if report.data_free else "output error |Y - Ŷ| / |Y| on calibration data"
    blocks = [f"Relative {kind}, root mean square over the layers:"]
    if by_modality:
        rows = [[_plain(m), f"{root_mean_square(errors):.4f}"] for m, errors in by_modality.items()]
        blocks.append(_table(["layer's contribution to the hidden states, by modality", "error"], rows))
    rows = [[_plain(kind), f"{error:.4f}"] for kind, error in part_errors(report).items()]
    return [*blocks, _table(["Linear", "error"], rows)]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_table(columns, rows))


def _not_evaluated(report: Report) -> str:
    known = (
        "only the errors of single weights are known, no data was used"
        if report.data_free
        else "only the errors of single layers on calibration data are known"
    )
    return (
        f"Not evaluated: {known}. `msmodelslim eval THIS --float FLOAT --dataset DATA --update_card` compares"
        " this model with its float model and writes the figures here."
    )


def _evaluation_text(report: EvalReport) -> str:
    """A headline, a table of few rows, and everything else folded."""
    columns, rows = figure_rows(report)
    data = _plain(Path(report.dataset).parent.name)
    headings = ["figure", *map(_plain, columns[1:])]
    warnings = [f"Note: {_plain(warning, 300)}." for warning in report.warnings[:_SHOWN_WARNINGS]]
    digest = f" (SHA-256 of its index `{_plain(report.dataset_digest)[:16]}`)" if report.dataset_digest else ""
    return "\n\n".join(
        [
            judgement(report),
            f"Compared with its float model on {report.samples} samples of `{data}`{digest}; scored:"
            f" {_plain(report.scored)}; seed {report.seed}. Brackets hold 95 % intervals over samples.",
            _table(headings, [row for row in rows if row[0] in _HEADLINE_FIGURES]),
            *warnings,
            "<details><summary>All figures</summary>",
            _table(headings, rows),
            "KL: divergence between the next-token distributions of the float and the quantized model. Top-1:"
            " positions with the same most likely token. Top-5: shared tokens among the five most likely, in any order;"
            " it may be below top-1. Exact: greedy answers that equal the expected answer. Hidden: final hidden states."
            " `text`: text-only samples; a sample with several modalities counts under each.",
            "</details>",
        ]
    )


_HEADLINE_FIGURES = ("samples", "KL mean, nats", "top-1 agreement", "exact, float", "exact, quant", "exact, change")
_SHOWN_WARNINGS = 5


def _loading_texts(report: Report, model: ModelSpec, loads: Mapping[str, Loads]) -> list[str]:
    """Blocks for every runtime that the table of compatibility lists, and a line about the others."""
    blocks = [*_vllm_texts(report, model, loads), *_transformers_texts(model, loads)]
    _, others = describe_readers(loads)
    if others:
        blocks.append(f"Other runtimes: {others}.")
    return blocks


def _vllm_texts(report: Report, model: ModelSpec, loads: Mapping[str, Loads]) -> list[str]:
    commands = serve_commands(loads, REPOSITORY)
    if not commands:
        return []
    proofs = "\n".join(f"- {RUNTIMES[name]}: {PROOFS[loads[name].proof]} ({loads[name].how})." for name in commands)
    code = "\n".join(line for name, command in commands.items() for line in (f"# {RUNTIMES[name]}", command))
    speech = ""
    if model.speech_prefixes:
        kept = "; the parts that speak are for transformers" if not _lacks_speech(report, model) else ""
        speech = f" It answers in text{kept}."
    return [f"vLLM.{speech}", proofs, f"```\n{code}\n```", f"```\n{image_request(REPOSITORY)}\n```"]


def _transformers_texts(model: ModelSpec, loads: Mapping[str, Loads]) -> list[str]:
    answering, speaking = class_uses(loads)
    blocks: list[str] = []
    uses = [(answering, answering_class(model), "text answers")]
    if speaking:
        uses.append((speaking, speaking_class(model), "text and speech"))
    for versions, architecture, purpose in uses:
        for use in dict.fromkeys(versions.values()):  # one block for each way to load
            names = [name for name, other in versions.items() if other == use]
            tested = ", ".join(f"{RUNTIMES[name].removeprefix('transformers ')}" for name in names)
            packages = " ".join(dict.fromkeys(package for name in names for package in loads[name].packages))
            blocks.append(
                f"transformers ({loads[names[0]].proof}: {tested}), {purpose}; `pip install transformers {packages}`:"
            )
            blocks.append(f"```python\n{load_snippet(architecture, use, REPOSITORY)}\n```")
    if "dequantized" in (*answering.values(), *speaking.values()):
        blocks.append(DEQUANTIZE_NOTE)
    return blocks


def _provenance(report: Report, has_recipe: bool) -> list[str]:
    if not report.layers:
        return ["Another tool quantized this model, or its report is missing. This format stores the same integers."]
    recipe = f"{_plain(Path(report.recipe).stem)}.yaml"
    total = sum(report.tokens_by_modality.values())
    shares = ", ".join(f"{_plain(name)} {count / total:.1%}" for name, count in report.tokens_by_modality.items())
    data = "none (data-free)"
    if not report.data_free:
        name = f" of `{_plain(report.dataset)}`" if report.dataset else ""
        digest = f" (SHA-256 of its index `{_plain(report.dataset_digest)[:16]}`)" if report.dataset_digest else ""
        given, own = count_samples(report)
        data = f"{given}{name}{digest}{own}, {total} tokens ({shares})"
    versions = ", ".join(f"{_plain(name)} {_plain(number)}" for name, number in report.versions.items())
    lines = [" ".join(_word(word) for word in command) for command in report.commands]
    commands = "\n".join(lines)
    return [
        *([f"```\n{commands}\n```"] if lines else ["The command was not recorded."]),
        f"Calibration: {data}. Device: {_plain(report.device)}. Versions: {versions}.",
        *([f"The recipe is [{recipe}]({quote(recipe)})."] if has_recipe else []),
    ]


def _word(word: str) -> str:
    """A word of a command as a shell takes it, without characters that could end the block of code."""
    return shlex.quote(re.sub(r"[^\w .,:/+=()%~@-]", "?", word)[:200])


_LIMITS = """\
Evaluate the model on your own data before you rely on it. Quantization involves no training: the biases and limits of
the float model remain, and its licence applies."""
_INFERRED_BASE = """ \
The float model, {base}, is inferred from `config.json`; correct the header if the source was a fine-tune of it."""
