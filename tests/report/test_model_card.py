"""README.md of an output: a header that parses, the figures of the report, and no markup from untrusted text."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import MINMAX, command, quant
from reports import HOSTILE, data_free, made_evaluation, made_report

from msmodelslim_omni.compatibility import loads_in
from msmodelslim_omni.compatibility.table import UNKNOWN
from msmodelslim_omni.doctor import examine
from msmodelslim_omni.formats import FORMATS
from msmodelslim_omni.models import MODEL_TYPES
from msmodelslim_omni.models.qwen2_5 import load_transformers
from msmodelslim_omni.numerics import QuantScheme
from msmodelslim_omni.plan.schemes import scheme_of
from msmodelslim_omni.quantized.export import export
from msmodelslim_omni.recipe import LinearQuantConfig, Recipe, shipped_recipes
from msmodelslim_omni.report.documents import stored_report, write_evaluation
from msmodelslim_omni.report.model_card import make_card, update_evaluation, write_card
from msmodelslim_omni.report.report import LEFT_OUT, PartSize, Report, human_bytes, read_report
from msmodelslim_omni.runtime.progress import Progress

OMNI, VL = MODEL_TYPES["Qwen2.5-Omni-7B"], MODEL_TYPES["Qwen2.5-VL-7B-Instruct"]
SOURCE_CARD = (
    "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: LICENSE\nlanguage: [en, zh]\n---\n# Mine\n"
)


def header_of(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    header = yaml.safe_load(card.split("\n---\n", 1)[0][4:])
    assert isinstance(header, dict)
    return header


def published_config(hidden: int = 2048, layers: int = 36, **more: Any) -> str:
    return json.dumps({"thinker_config": {"text_config": {"hidden_size": hidden, "num_hidden_layers": layers}}, **more})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output folder before the card is written; its config has the shape of the published 3B."""
    (tmp_path / "config.json").write_text(published_config(), encoding="utf-8")
    return tmp_path


def write_and_read_card(output: Path, **changes: Any) -> str:
    write_card(output, replace(made_report(), **changes), "awq", OMNI, "apiversion: x\n")
    return (output / "README.md").read_text(encoding="utf-8")


# --- the header ----------------------------------------------------------------------------------------------


def test_header_of_a_published_model(output: Path) -> None:
    (output / "README.md").write_text(SOURCE_CARD, encoding="utf-8")
    assert header_of(write_and_read_card(output)) == {
        "license": "other",
        "license_name": "qwen-research",
        "license_link": "LICENSE",
        "language": ["en", "zh"],
        "pipeline_tag": "any-to-any",
        "base_model": "Qwen/Qwen2.5-Omni-3B",
        "base_model_relation": "quantized",
        "tags": ["msmodelslim_omni", "quantized", "w4a16", "awq"],
    }
    assert (output / "README.source.md").read_text(encoding="utf-8") == SOURCE_CARD


@pytest.mark.parametrize(
    ("config", "base"),
    [
        (published_config(3584, 28), "Qwen/Qwen2.5-Omni-7B"),
        (published_config(64, 2), None),
        (published_config(64, 2, _name_or_path="someone/Omni-tuned"), "someone/Omni-tuned"),
        (published_config(64, 2, _name_or_path="/home/someone/model"), None),
        (published_config(64, 2, _name_or_path="a/b\nlicense: mit"), None),
        (published_config(64, 2, _name_or_path=["a/b"]), None),
    ],
)
def test_base_model(output: Path, config: str, base: str | None) -> None:
    (output / "config.json").write_text(config, encoding="utf-8")
    header = header_of(write_and_read_card(output))
    assert header.get("base_model") == base and ("base_model_relation" in header) == (base is not None)
    assert "license" not in header and "language" not in header


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("                   Apache License\n             Version 2.0, January 2004", {"license": "apache-2.0"}),
        ("MIT License\n\nCopyright", {"license": "mit"}),
        ("Qwen RESEARCH LICENSE AGREEMENT", {"license": "other", "license_name": "qwen-research"}),
        ("All rights reserved.", {"license": "other"}),
    ],
)
def test_licence_of_a_source_without_a_card(output: Path, text: str, expected: dict[str, str]) -> None:
    (output / "LICENSE").write_text(text, encoding="utf-8")
    header = header_of(write_and_read_card(output))
    assert {key: header.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: [unclosed\n---\n",
        "---\nlicense: !!python/object/apply:os.system [id]\n---\n",
        "---\njust a text\n---\n",
        "---\nlicense: 'mit\n\n  evil: 1'\nlanguage: {en: 1}\nlicense_link: 'javascript:alert(1)'\n---\n",
        "---\n" + "[" * 2000 + "\n---\n",
        "no header at all",
        "",
    ],
)
def test_invalid_headers_are_dropped(output: Path, card: str) -> None:
    (output / "README.md").write_text(card, encoding="utf-8")
    header = header_of(write_and_read_card(output))
    assert not {"license", "license_link", "language", "evil"} & header.keys()
    assert (output / "README.source.md").read_text(encoding="utf-8") == card


# --- the text ------------------------------------------------------------------------------------------------


def test_card_shows_the_figures_of_the_report(output: Path) -> None:
    card = write_and_read_card(output)
    for words in (
        "# Qwen2.5-Omni-3B, W4A16_G64", "int4 weights in groups of 64 with zero points", "2.00 MiB",
        "| audio | 0.0600 |", "| q_proj |", "43 samples of `calib` (SHA-256 of its index `0123456789abcdef`)",
        "1000 tokens (text 60.0%", "--config_path recipe.yaml", "--max_samples 43", "[recipe.yaml](recipe.yaml)",
        "vllm serve ORG/NAME", "image_url", "Not evaluated",
        "| memory of the weights that answer in text | 4.00 GiB | 2.00 GiB |",
    ):  # fmt: skip
        assert words in card, words
    assert "/models/" not in card and "/out/" not in card  # no local folders
    assert "12.5" not in card and "3.00 GiB" not in card  # no values that differ between runs
    assert "AutoAWQ" not in card and "from transformers" not in card  # no transformers loads awq as it is


def report_of(saver: str, *schemes: str, omitted: str = "") -> Report:
    """The made report with these schemes in turn. omitted: the name of a part that is left out."""
    report, names = made_report(), itertools.cycle(schemes)
    layers = tuple(
        replace(layer, linears=tuple(replace(linear, scheme=next(names)) for linear in layer.linears))
        for layer in report.layers
    )
    parts = (*report.parts, *([PartSize(omitted, 1, 1, 0, LEFT_OUT)] if omitted else []))
    return replace(report, layers=layers, parts=parts, output_bytes={saver: 1, "other": 2}, savers={saver: "/out/x"})


@pytest.mark.parametrize(
    ("saver", "scheme", "expected", "absent"),
    [
        ("compressed_tensors", "W8A8_DYNAMIC", "run_compressed=False", "--quantization ascend"),
        ("compressed_tensors", "W4A16_G128", "`dequantize=True`", "(run: 4.57.3, 5.23.0)"),
        ("ascendv1_saver", "W8A8_DYNAMIC", "vllm serve ORG/NAME --quantization ascend", "transformers import"),
        ("bitsandbytes", "NF4_G64", "pip install transformers bitsandbytes", "vllm serve"),
        ("bitsandbytes", "NF4_G64", "4-bit NormalFloat weights in blocks of 64", "compressed"),
        ("compressed_tensors", "W5A5", "vLLM-Ascend (unknown: not in the table", "vllm serve"),
    ],
)
def test_loading_text_depends_on_format_and_scheme(saver: str, scheme: str, expected: str, absent: str) -> None:
    card = make_card(report_of(saver, scheme), saver, OMNI, "", {})
    assert expected in card and absent not in card
    assert ("library_name" in header_of(card)) == ("from_pretrained" in card)


def test_card_of_a_model_without_speech() -> None:
    card = make_card(report_of("compressed_tensors", "W8A8_DYNAMIC"), "compressed_tensors", VL, "", {})
    assert header_of(card)["pipeline_tag"] == "image-text-to-text"
    assert "Omni" not in card.split("## How to load it")[1].split("## How it was made")[0] and "talker" not in card
    assert "Qwen2_5_VLForConditionalGeneration.from_pretrained" in card


def test_card_of_an_output_whose_speech_is_left_out() -> None:
    report = report_of("compressed_tensors", "W8A8_DYNAMIC", omitted="talker")
    card = make_card(report, "compressed_tensors", OMNI, "", {})
    assert header_of(card)["pipeline_tag"] == "image-text-to-text" and "Omitted: talker." in card
    assert "import Qwen2_5OmniThinkerForConditionalGeneration" in card
    assert "import Qwen2_5OmniForConditionalGeneration" not in card


def test_mixed_precision_names_its_runtimes() -> None:
    report = report_of("compressed_tensors", "W8A8_DYNAMIC", "W4A16_G128_SYM", "FLOAT")
    card = make_card(report, "compressed_tensors", OMNI, "", {})
    assert "vllm serve ORG/NAME" in card and "doctor" not in card
    assert "(run: 4.57.3, 5.23.0), text answers" in card and "(run: 4.57.3), text and speech" in card


def test_data_free_card_shows_weight_errors(output: Path) -> None:
    free = data_free(made_report())
    card = make_card(free, "awq", OMNI, "", {})
    assert "weight error |W - Ŵ| / |W|" in card and "none (data-free)" in card and "| q_proj | 0.0800 |" in card
    assert "no data was used" in card and "on calibration data" not in card


def test_a_folder_called_model_gives_no_title() -> None:
    card = make_card(replace(made_report(), model_path="/data/model"), "awq", OMNI, "", {})
    assert "# qwen2_5_omni, W4A16_G64" in card


# --- every shipped recipe in every format that holds its result ----------------------------------------------


def schemes_of(recipe: Recipe) -> list[QuantScheme]:
    configs = [config.qconfig for _, config in recipe.processors() if isinstance(config, LinearQuantConfig)]
    return [scheme_of(config.weight, config.act) for config in configs]


def shipped_outputs() -> list[tuple[str, str, str]]:
    """(model type, saver, recipe) for every shipped recipe, model type it names, and format that holds its result."""
    outputs = []
    for recipe in shipped_recipes():
        for saver, output_format in FORMATS.items():
            schemes = {
                scheme_of(c.qconfig.weight, c.qconfig.act)
                for _, c in recipe.processors()
                if isinstance(c, LinearQuantConfig)
            }
            if not output_format.refusal(frozenset(schemes)):
                names = recipe.metadata.verified_model_types
                outputs += [(name, saver, recipe.metadata.config_id) for name in names]
    return outputs


@pytest.mark.parametrize(("model_type", "saver", "config_id"), shipped_outputs())
def test_card_of_every_shipped_recipe_and_format(model_type: str, saver: str, config_id: str) -> None:
    """The runtimes are those of the table, and every class that a snippet imports exists and loads the model."""
    recipe = next(r for r in shipped_recipes() if r.metadata.config_id == config_id)
    schemes = [
        scheme_of(c.qconfig.weight, c.qconfig.act).name
        for _, c in recipe.processors()
        if isinstance(c, LinearQuantConfig)
    ]
    model = MODEL_TYPES[model_type]
    loads = loads_in(model.hf_model_type, saver, schemes)
    assert UNKNOWN not in loads.values(), f"add the entry ({model.hf_model_type}, {saver}, {schemes}) to TABLE"
    card = make_card(report_of(saver, *schemes), saver, model, "", {})
    known = {loaded.architecture for loaded in model.loaders.classes}
    imported = re.findall(r"^from transformers import (\w+)$", card, re.MULTILINE)
    assert set(imported) <= known and bool(imported) == bool(loads["transformers_5"].answering)
    for name in imported:
        assert getattr(load_transformers(), name).__name__ == name
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        compile(block, "card", "exec")
    served = any(loads[name].verdict == "yes" for name in ("vllm", "vllm_cpu", "vllm_ascend"))
    assert ("# vLLM" in card) == served
    assert ("vllm serve ORG/NAME\n" in card) == (loads["vllm"].verdict == "yes")
    assert ("api_server --model ORG/NAME" in card) == (loads["vllm_cpu"].verdict == "yes")
    assert ("--quantization ascend" in card) == (served and saver == "ascendv1_saver")


def test_hostile_names_do_not_become_markup(output: Path) -> None:
    (output / "config.json").write_text(published_config(64, 2, _name_or_path=HOSTILE), encoding="utf-8")
    recipe = f"a: 1 # {HOSTILE}\n```\n# heading\n````\n<script>alert(2)</script>"
    write_card(output, made_report(2, HOSTILE), "awq", OMNI, recipe)
    update_evaluation(output, made_evaluation(HOSTILE))
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "license" not in header_of(card)
    assert "script>" not in card and "](http" not in card and "](javascript" not in card
    assert card.count("```") % 2 == 0


# --- the source's card, and evaluations ----------------------------------------------------------------------


def test_source_cards_are_kept(output: Path) -> None:
    (output / "README.md").write_text("theirs", encoding="utf-8")
    (output / "README.source.md").write_text("older", encoding="utf-8")
    first = write_and_read_card(output)
    assert (output / "README.source.md").read_text(encoding="utf-8") == "older"
    assert (output / "README.source.source.md").read_text(encoding="utf-8") == "theirs"
    assert write_and_read_card(output) == first  # our own card is replaced, not kept
    (output / "README.md").write_text("theirs", encoding="utf-8")  # an interrupted run copies the files again
    assert write_and_read_card(output) == first and len(list(output.glob("README*"))) == 3


def test_evaluation_replaces_only_its_section(output: Path) -> None:
    before = write_and_read_card(output)
    assert update_evaluation(output, made_evaluation())
    after = (output / "README.md").read_text(encoding="utf-8")
    assert "Not evaluated" not in after and "| top-1 agreement |" in after and "40 samples of `data`" in after
    parts = [re.split("<!-- evaluation -->.*?<!-- end of evaluation -->", t, flags=re.DOTALL) for t in (before, after)]
    assert parts[0] == parts[1] and len(parts[0]) == 2
    assert update_evaluation(output, made_evaluation())  # again: the figures are replaced, not added
    assert (output / "README.md").read_text(encoding="utf-8") == after

    (output / "README.md").write_text("<!-- evaluation --> theirs <!-- end of evaluation -->", encoding="utf-8")
    assert not update_evaluation(output, made_evaluation())
    (output / "README.md").unlink()
    assert not update_evaluation(output, made_evaluation()) and not (output / "README.md").exists()


# --- through the commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a data-free run on a source with a card."""
    folder = tmp_path_factory.mktemp("card")
    source = Path(shutil.copytree(tiny, folder / "source"))
    (source / "README.md").write_text(SOURCE_CARD, encoding="utf-8")
    quant(source, folder / "out", "--config_path", MINMAX).done()
    return folder / "out"


def test_quant_writes_a_card_and_keeps_the_source_card(quantized: Path) -> None:
    assert (quantized / "README.source.md").read_text(encoding="utf-8") == SOURCE_CARD
    card = (quantized / "README.md").read_text(encoding="utf-8")
    header = header_of(card)
    assert header["license_name"] == "qwen-research" and header["tags"][2:] == ["w8a8", "ascendv1-saver"]
    assert "base_model" not in header and "# source, W8A8_DYNAMIC" in card
    diagnosis = examine(quantized)
    assert diagnosis.healthy and not [f for f in diagnosis.findings if "README" in f.where or "html" in f.where]


def test_export_writes_its_own_card(quantized: Path, tmp_path: Path) -> None:
    (quantized / "eval").mkdir(exist_ok=True)
    (quantized / "eval" / "quant_report.html").write_text("of the exported weights", encoding="utf-8")
    command("export", quantized, "--save_path", tmp_path / "out", "--save_format", "compressed_tensors").done()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert header_of(card)["tags"][3] == "compressed-tensors" and header_of(card)["license_name"] == "qwen-research"
    assert (tmp_path / "out" / "README.source.md").read_text(encoding="utf-8") == SOURCE_CARD
    assert not (tmp_path / "out" / "README.source.source.md").exists()
    assert "Weight error of each Linear" in (tmp_path / "out" / "quant_report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "eval").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": "long"},
        {"output_bytes": {"awq": "much"}},
        {"layers": [{"index": 0, "linears": [], "smoothing": [{"group": 1}], "notes": []}]},
        {"layers": 5},
        {"unknown key": 1},
    ],
)
def test_foreign_reports_are_ignored(quantized: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    source = Path(shutil.copytree(quantized, tmp_path / "source"))
    stored = json.loads((source / "quant_report.json").read_text(encoding="utf-8"))
    assert stored_report(source) is not None
    (source / "quant_report.json").write_text(json.dumps({**stored, **change}), encoding="utf-8")
    assert stored_report(source) is None
    export(source, tmp_path / "out", "compressed_tensors")
    assert "has no quantization report" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_reports_without_peak_rise_by_phase_can_be_read(quantized: Path, tmp_path: Path) -> None:
    stored = asdict(read_report(quantized))
    del stored["peak_rise_by_phase"]
    (tmp_path / "quant_report.json").write_text(json.dumps(stored), encoding="utf-8")
    assert read_report(tmp_path).peak_rise_by_phase == {}
    assert stored_report(tmp_path) is not None


def test_evaluation_page_includes_the_quantization(quantized: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(quantized, tmp_path / "out"))
    messages: list[str] = []
    progress = Progress()
    progress.say = messages.append  # type: ignore[method-assign]
    evaluation = replace(made_evaluation(), quant_path=str(output))
    write_evaluation(evaluation, (), tmp_path, progress, update_card=True)
    page = (tmp_path / "eval_report.html").read_text(encoding="utf-8")
    assert "Evaluation: out, awq" in page and "Quantization: Qwen2.5-Omni-7B" in page and "apiversion" in page
    assert "| top-1 agreement |" in (output / "README.md").read_text(encoding="utf-8")
    size = human_bytes(len(page.encode()))
    assert messages == [
        f"page: {tmp_path / 'eval_report.html'}, {size}, one file without links",
        f"added the figures to the model card {output / 'README.md'}",
    ]
    assert not (tmp_path / "quant_report.html").exists()
