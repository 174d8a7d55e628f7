"""The documents show the table of compatibility as it is in the package, and the table is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from msmodelslim_omni.compatibility.matrix import BEGIN, END, matrix_markdown
from msmodelslim_omni.compatibility.table import (
    FAMILIES,
    PROOFS,
    RUNTIMES,
    SCHEMES,
    TABLE,
    UNKNOWN,
    kind_of_schemes,
    loads_in,
)
from msmodelslim_omni.compatibility.usage import load_snippet, serve_commands
from msmodelslim_omni.formats import FORMATS
from msmodelslim_omni.models import MODEL_TYPES

ROOT = Path(__file__).parents[2]
UPDATE = "run: python -c 'from pathlib import Path; from msmodelslim_omni.compatibility.matrix import update_document;"


def test_documents_show_the_table() -> None:
    documents = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")) if BEGIN in path.read_text("utf-8")]
    assert ROOT / "docs" / "compatibility.md" in documents
    for document in documents:
        shown = BEGIN + document.read_text("utf-8").split(BEGIN)[1].split(END)[0] + END
        assert shown == matrix_markdown(), f"{UPDATE} update_document(Path({str(document)!r}))'"


def test_entries_are_complete_and_unique() -> None:
    keys = [(entry.family, entry.format, entry.scheme) for entry in TABLE]
    assert len(set(keys)) == len(keys)
    families = {spec.hf_model_type: spec for spec in MODEL_TYPES.values()}
    for entry in TABLE:
        assert entry.family in families.keys() & FAMILIES.keys()
        assert entry.format in FORMATS and entry.scheme in SCHEMES
        assert entry.loads.keys() == RUNTIMES.keys()
        for runtime, loads in entry.loads.items():
            assert loads.proof in PROOFS and loads.how, (entry, runtime)
            assert (loads.verdict == "yes") == (loads.proof != "not run"), (entry, runtime)
            uses_class = runtime.startswith("transformers") and loads.verdict == "yes"
            assert bool(loads.answering) == uses_class and bool(loads.packages) == uses_class, (entry, runtime)
            assert not loads.speaking or families[entry.family].speech_prefixes, (entry, runtime)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["W8A8_DYNAMIC", "FLOAT"], "w8a8"),
        (["W4A16_G128", "W4A16_G32"], "w4a16"),
        (["W4A16_G64_SYM"], "w4a16_sym"),
        (["W8A8_DYNAMIC", "W4A16_G128_SYM"], "w4a16_sym+w8a8"),
        (["NF4_G64_DOUBLE"], "nf4"),
        (["W3A16"], "W3A16"),
        ([], ""),
    ],
)
def test_kind_of_schemes(names: list[str], kind: str) -> None:
    assert kind_of_schemes(names) == kind


def test_a_combination_without_an_entry_is_unknown() -> None:
    for asked in (("llama", "awq", ["W4A16_G128"]), ("qwen2_5_omni", "awq", ["W8A8_DYNAMIC"])):
        assert loads_in(*asked) == dict.fromkeys(RUNTIMES, UNKNOWN)
        assert serve_commands(loads_in(*asked), "x") == {}


def test_a_server_has_a_command_only_where_the_table_says_that_it_loads() -> None:
    for entry in TABLE:
        commands = serve_commands(entry.loads, "x")
        assert set(commands) == {r for r in ("vllm", "vllm_cpu", "vllm_ascend") if entry.loads[r].verdict == "yes"}


def test_nothing_speaks_without_the_talker() -> None:
    found = loads_in("qwen2_5_omni", "bitsandbytes", ["NF4_G64"], without_speech=True)
    assert found["transformers_4"].answering == "plain" and found["transformers_4"].speaking == ""


def test_commands_and_snippets() -> None:
    ascend = loads_in("qwen2_5_vl", "ascendv1_saver", ["W8A8_DYNAMIC"])
    assert serve_commands(ascend, "a b") == {"vllm_ascend": "vllm serve 'a b' --quantization ascend"}
    assert serve_commands(loads_in("qwen2_5_vl", "awq", ["W4A16_G128"]), "ORG/NAME") == {
        "vllm": "vllm serve ORG/NAME",
        "vllm_cpu": "python -m vllm.entrypoints.openai.api_server --model ORG/NAME --dtype bfloat16"
        " --max-model-len 2048",
    }
    assert load_snippet("SomeClass", "plain", "ORG/NAME") == (
        'from transformers import SomeClass\n\nmodel = SomeClass.from_pretrained(\n    "ORG/NAME",\n'
        '    dtype="bfloat16",\n)'
    )
