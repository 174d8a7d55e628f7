"""The command line itself: arguments, help, answers to typing errors before torch is imported, and recipes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import MINMAX, command, quant, write_index
from typer.testing import CliRunner

from msmodelslim_omni import QuantError, __version__, load_recipe
from msmodelslim_omni.cli import app
from msmodelslim_omni.commands.completion import quant_types
from msmodelslim_omni.commands.show_plan import grouped_decisions, kept_rows, ranges
from msmodelslim_omni.files import find_model_folder, parse_size
from msmodelslim_omni.models.spec import Part
from msmodelslim_omni.recipe import find_recipe, saver_names
from msmodelslim_omni.recipe.loading import QUANT_TYPE_ALIASES

ROOT = Path(__file__).parents[2]


# --- help and version ----------------------------------------------------------------------------------------


def test_version_and_short_help() -> None:
    assert command("--version").done().out == f"msmodelslim_omni {__version__}\n"
    assert command("-V").done().out == command("--version").out
    assert command("-h").done().out == command("--help").out == command().done().out
    assert command("quant", "-h").done().out == command("quant", "--help").out


def test_help_of_a_verb_has_groups_and_examples() -> None:
    text = command("quant", "--help").done().out
    for group in ("How to quantize", "Samples", "Machine", "Messages and results", "Examples:"):
        assert group in text
    assert "msmodelslim quant ./Qwen2.5-Omni-7B ./out --quant_type w8a8 --device npu" in " ".join(text.split())


def test_all_shipped_examples_parse() -> None:
    """Every example in a help text names flags that exist: the path is the first thing that is wrong."""
    from msmodelslim_omni.commands.examples import EXAMPLES

    for verb, lines in EXAMPLES.items():
        for line in lines:
            result = command(*line.replace('"', "").replace("What do you hear?", "Hello").split())
            assert result.code != 2, line + result.err
            assert verb == "env" or "does not exist" in result.err, line


# --- arguments -----------------------------------------------------------------------------------------------


def test_both_missing_paths_are_told_at_once() -> None:
    result = command("quant")
    assert result.code == 2
    assert "Missing PATH (or --model_path). Missing SAVE_PATH (or --save_path)." in " ".join(result.err.split())


def test_empty_and_double_paths_are_wrong_usage(tmp_path: Path) -> None:
    result = command("quant", "--model_path", "", "--save_path", tmp_path / "out")
    assert result.code == 2 and "PATH (--model_path) is empty." in result.err
    result = command("quant", "a", "b", "--model_path", "c")
    assert result.code == 2 and "PATH is given twice, as 'a' and as --model_path 'c'" in " ".join(result.err.split())


def test_paths_as_arguments_and_as_flags_are_the_same(tiny: Path, tmp_path: Path) -> None:
    by_flag = quant(tiny, tmp_path / "out", "--config_path", MINMAX, "--dry_run", "--json").done().json
    words = ("quant", tiny, tmp_path / "out", "--config-path", MINMAX, "--device", "cpu", "--dry-run", "--json")
    assert command(*words).done().json == by_flag


def test_tags_of_msmodelslim_are_ignored_with_a_remark(tiny: Path, tmp_path: Path) -> None:
    words = ("--tag", "vLLM-Ascend", "Atlas_A2_Inference", "--quant_type", "w8a8_minmax", "--dry_run", "--json")
    answer = quant(tiny, tmp_path / "out", *words).done()
    assert "--tag is ignored" in answer.err
    assert answer.json["recipe"].endswith("qwen2_5_omni_w8a8_minmax.yaml")


@pytest.mark.parametrize(
    ("text", "size"), [("6G", 6 << 30), ("6g", 6 << 30), ("6GiB", 6 << 30), ("6GB", 6 * 10**9), ("512 M", 512 << 20)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("quant_type", "recipe"),
    [
        ("int4", "qwen2_5_omni_w4a16"),
        ("GPTQ", "qwen2_5_omni_w4a16"),
        ("int8", "qwen2_5_omni_w8a8"),
        ("w4a16_sym", "qwen2_5_omni_w4a16_sym"),
        ("w8a8_minmax", "qwen2_5_omni_w8a8_minmax"),
        ("bnb", "qwen2_5_omni_nf4"),
    ],
)
def test_quant_types_of_other_tools(quant_type: str, recipe: str) -> None:
    assert find_recipe("Qwen2.5-Omni-7B", quant_type).metadata.config_id == recipe


@pytest.mark.parametrize("quant_type", ["int5", "w4a8", "w5a5", "q4"])
def test_no_quant_type_is_suggested_where_none_is_near(quant_type: str) -> None:
    with pytest.raises(QuantError, match=f"'{quant_type}'.*Quant types with a recipe: fp8, .*w8a8") as fault:
        find_recipe("Qwen2.5-Omni-7B", quant_type)
    assert "Did you mean" not in str(fault.value)


@pytest.mark.parametrize(("quant_type", "meant"), [("w8a", "w8a8"), ("int44", "w4a16"), ("nvfp4a1", "nvfp4a16")])
def test_a_near_quant_type_is_suggested(quant_type: str, meant: str) -> None:
    with pytest.raises(QuantError, match=f"Did you mean '{meant}'"):
        find_recipe("Qwen2.5-Omni-7B", quant_type)


def test_every_alias_has_a_recipe() -> None:
    assert all(find_recipe("Qwen2.5-VL-3B-Instruct", alias) for alias in QUANT_TYPE_ALIASES)


def test_spellings_of_formats() -> None:
    assert saver_names(["compressed-tensors", "AWQ,ascendv1"]) == ["compressed_tensors", "awq", "ascendv1_saver"]
    with pytest.raises(QuantError, match=r"unknown save_format 'gguf'"):
        saver_names(["awq,gguf"])


# --- answers before torch is imported ------------------------------------------------------------------------

WITHOUT_TORCH = """
import contextlib, io, json, sys
from msmodelslim_omni.cli import main
answers = []
for words in json.load(sys.stdin):
    sys.argv[1:] = words
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            main()
        except SystemExit as end:
            answers.append([end.code, stderr.getvalue(), "torch" in sys.modules])
print(json.dumps(answers))
"""
TYPING_ERRORS = (
    ("quant nowhere out", "does not exist"),
    ("quant Qwen/Qwen2.5-Omni-7B out", "hf download Qwen/Qwen2.5-Omni-7B --local-dir Qwen2.5-Omni-7B"),
    ("quant MODEL MODEL/out", "lie inside one another"),
    ("quant MODEL out --dataset none", "dataset 'none' does not exist"),
    ("quant MODEL out --dataset MODEL/cat.png", "is not an index: its suffix is '.png'"),
    ("quant MODEL out --quant_type w4a15", "Did you mean 'w4a16'?"),
    ("quant MODEL out --config_path none", "recipe 'none' does not exist"),
    ("quant MODEL out --max_memory 6X", "'6X' is not a size"),
    ("analyze MODEL MODEL", "lie inside one another"),
    ("export nowhere out --save_format awq", "does not exist"),
    ("eval nowhere --float MODEL --dataset calibVideos", "does not exist"),
    ("generate nowhere --text Hi", "does not exist"),
)


def test_typing_errors_are_answered_without_torch(tmp_path: Path) -> None:
    """One after the other in a process of their own."""
    (tmp_path / "MODEL").mkdir()
    (tmp_path / "MODEL" / "config.json").write_text("{}")
    (tmp_path / "MODEL" / "cat.png").write_bytes(b"\x89PNG")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input=json.dumps([line.split() for line, _ in TYPING_ERRORS]),
        capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (line, expected), (code, message, torch) in zip(TYPING_ERRORS, json.loads(done.stdout), strict=True):
        assert (code, torch) == (1, False), (line, message)
        assert expected in " ".join(message.split()), line


def test_an_error_is_json_too(tmp_path: Path) -> None:
    answer = quant(tmp_path / "nowhere", tmp_path / "out", "--json")
    assert answer.code == 1
    assert "does not exist" in answer.json["error"] and answer.json["hint"]
    for verb in ("doctor", "inspect"):  # apart from a sick checkpoint, which is a result
        answer = command(verb, tmp_path / "nowhere", "--json")
        assert answer.code == 1 and "does not exist" in answer.json["error"]


def test_hub_name_is_found_in_the_local_cache(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of a Hugging Face cache: refs/main names the snapshot, whose files link to blobs."""
    repository = tmp_path / "hub" / "models--Org--Tiny-Omni"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in tiny.iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_model_folder("Org/Tiny-Omni") == snapshot
    answer = command("quant", "Org/Tiny-Omni", tmp_path / "out", "--config_path", MINMAX, "--device", "cpu").done()
    assert f"model {snapshot}, from the local hub cache" in answer.err
    assert (tmp_path / "out" / "spk_dict.pt").read_bytes() == (tiny / "spk_dict.pt").read_bytes()
    with pytest.raises(QuantError, match="no model of this name is in the local hub cache"):
        find_model_folder("Org/Other")


def test_a_dataset_of_a_hub_is_answered_with_the_download(tiny: Path, tmp_path: Path) -> None:
    answer = quant(tiny, tmp_path / "out", "--dataset", "org/Some-Samples")
    assert "dataset 'org/Some-Samples' does not exist here; datasets of a hub are not downloaded" in answer.fault()
    assert "hf download --repo-type dataset org/Some-Samples --local-dir Some-Samples" in answer.err


# --- completion, environment variables, quiet ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["quant", "--quant_type", "w4"], {"w4a16", "w4a16_awq", "w4a16_sym", "w4a16_text", "w4a8"}),
        (["quant", "--save_format", "awq,c"], {"awq,compressed_tensors"}),
        (["quant", "--device", ""], {"auto", "cpu", "cuda", "npu"}),
        (["quant", "--model_type", "Qwen2.5-VL-3"], {"Qwen2.5-VL-3B-Instruct"}),
        (["eval", "--dataset", "cal"], {"calibVideos"}),
        (["recipes", "show", "qwen2_5_omni_w8a8_m"], {"qwen2_5_omni_w8a8_minmax", "qwen2_5_omni_w8a8_mixed"}),
        (["help", "do"], {"doctor"}),
    ],
)
def test_the_shell_completes_values(words: list[str], expected: set[str]) -> None:
    environment = {
        "_MSMODELSLIM_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["msmodelslim", *words]),
        "COMP_CWORD": str(len(words)),
    }
    completed = CliRunner().invoke(app, [], env=environment, prog_name="msmodelslim")
    assert set(completed.stdout.split()) == expected


def test_other_names_of_quant_types_are_completed() -> None:
    assert ("int4", "same as w4a16") in quant_types("int")
    assert all(find_recipe("Qwen2.5-VL-3B-Instruct", alias) for alias, _ in quant_types("b"))


def test_defaults_come_from_the_environment(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSMODELSLIM_DEVICE", "cuda:7")
    monkeypatch.setenv("MSMODELSLIM_LOG_FILE", str(tmp_path / "run.log"))
    words = ("quant", tiny, tmp_path / "out", "--config_path", MINMAX, "--dry_run")
    assert "cuda:7" in command(*words).fault()
    assert "device cpu" in command(*words, "--device", "cpu").done().err
    assert "device cpu" in (tmp_path / "run.log").read_text()


def test_quiet_prints_the_result_alone(tiny: Path, tmp_path: Path) -> None:
    answer = quant(tiny, tmp_path / "out", "--config_path", MINMAX, "-q").done()
    assert answer.err == "" and "Result" in answer.out


# --- dry run -------------------------------------------------------------------------------------------------


def test_layers_with_equal_decisions_share_a_row() -> None:
    decisions = [
        (f"thinker.model.layers.{layer}.mlp.{linear}_proj", "W8A8" if layer != 3 or linear != "down" else "FLOAT", "")
        for layer in range(28)
        for linear in ("up", "down")
    ]
    assert grouped_decisions(decisions) == [
        ["0-2, 4-27", "up down", "W8A8", ""],
        ["3", "up", "W8A8", ""],
        ["3", "down", "FLOAT", ""],
    ]
    assert ranges([5, 1, 2, 0]) == "0-2, 5"


def test_parts_that_stay_float_for_one_reason_share_a_row() -> None:
    parts = [
        Part("talker", "talker.", "speech"),
        Part("lm_head", "lm_head.", "output"),
        Part("vocoder", "v.", "speech"),
    ]
    assert kept_rows([(part, 2**20 * size) for part, size in zip(parts, (3, 1, 2), strict=True)]) == [
        ["talker 3.00 MiB, vocoder 2.00 MiB: speech"],
        ["lm_head 1.00 MiB: output"],
    ]


def test_dry_run_is_short_and_all_lists_every_linear(tiny: Path, tmp_path: Path) -> None:
    short = quant(tiny, tmp_path / "out", "--config_path", MINMAX, "--dry_run").done().out
    assert short.index("Estimates") < short.index("Linears of the decoder layers")
    assert "0-3 " in short and "q k v o gate up down" in short and len(short.splitlines()) < 25
    rows = quant(tiny, tmp_path / "out", "--config_path", MINMAX, "--dry_run", "--all").done().out
    assert rows.count("W8A8_DYNAMIC") == 28


# --- recipes and env -----------------------------------------------------------------------------------------


def test_shipped_recipes_by_name() -> None:
    assert load_recipe(MINMAX).metadata.config_id == MINMAX


def test_a_recipe_is_a_line_of_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = command("recipes", "list").done().out.splitlines()
    rows = [line.rstrip() for line in lines if line.startswith("qwen")]
    assert [row.split()[0] for row in rows] == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert all(row.split()[1] in ("yes", "no") and len(row) <= 80 for row in rows)
    assert len(lines) < len(rows) + 8 and any(row.endswith("…") for row in rows)
    assert any("Data-free W8A8: plain rounding" in row for row in rows)


def test_copied_recipe_is_the_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    assert str(path) in command("recipes", "copy", MINMAX, path).done().out
    assert path.read_text() == (ROOT / "configs" / f"{MINMAX}.yaml").read_text()
    assert "exists" in command("recipes", "copy", MINMAX, path).fault()
    assert "does not end in .yaml" in command("recipes", "copy", MINMAX, tmp_path / "mine").fault()


def test_every_file_is_validated(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{")
    (tmp_path / "b.yaml").write_text("apiversion: 3\n")
    result = command("recipes", "validate", tmp_path / "a.yaml", tmp_path / "b.yaml", MINMAX)
    assert result.code == 1 and result.out == f"{MINMAX}: valid\n"
    assert "a.yaml:" in result.err and "b.yaml:1: apiversion" in result.err
    checks = command("recipes", "validate", MINMAX, tmp_path / "a.yaml", "--json").json
    assert [bool(check["errors"]) for check in checks] == [False, True]


def test_recipe_is_validated_against_a_model(tiny: Path, tmp_path: Path) -> None:
    text = (ROOT / "configs" / f"{MINMAX}.yaml").read_text()
    (tmp_path / "split.yaml").write_text(text.replace('exclude: ["', 'exclude: ["*q_proj", "'))
    (tmp_path / "typo.yaml").write_text(text.replace('exclude: ["', 'exclude: ["*nothing*", "'))
    for name in ("split", "typo"):
        command("recipes", "validate", tmp_path / f"{name}.yaml").done()
    split = command("recipes", "validate", tmp_path / "split.yaml", "--model_path", tiny)
    assert split.code == 1 and "q_proj" in split.err
    typo = command("recipes", "validate", tmp_path / "typo.yaml", "--model_path", tiny).done()
    assert "warning: " in typo.err and "'*nothing*' matches no Linear" in typo.err


def test_smoothing_behind_rounding_needs_no_model_to_be_found(tmp_path: Path) -> None:
    text = (ROOT / "configs" / f"{MINMAX}.yaml").read_text()
    path = tmp_path / "order.yaml"
    path.write_text(text.replace("  save:", "    - {type: iter_smooth}\n  save:"))
    assert "comes after linear_quant" in command("recipes", "validate", path).err


def test_recipe_of_another_model_is_a_warning(tiny_vl: Path, tmp_path: Path) -> None:
    answer = quant(tiny_vl, tmp_path / "out", "--config_path", MINMAX, "--dry_run").done()
    assert f"{MINMAX}.yaml is made for Qwen2.5-Omni-7B, Qwen2.5-Omni-3B, not for Qwen2.5-VL-7B-Instruct" in answer.err


def test_env_names_versions_and_device() -> None:
    facts = json.loads(command("env", "--json").done().out)
    assert facts["msmodelslim_omni"] == __version__ and "torch" in facts and "cpu" in facts["device"]


def test_package_is_marked_as_typed() -> None:
    assert (ROOT / "msmodelslim_omni" / "py.typed").is_file()


# --- finished runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", [(), ("--save_format", "ascendv1_saver,compressed-tensors")])
def test_finished_run_is_not_done_again(formats: tuple[str, ...], tiny: Path, tmp_path: Path) -> None:
    words = ("--config_path", MINMAX, *formats)
    first = quant(tiny, tmp_path / "out", *words, "--json").done().json
    answer = quant(tiny, tmp_path / "out", *words, "--json").done()
    assert "finished already" in answer.err and answer.json == first
    seeded = quant(tiny, tmp_path / "out", *words, "--seed", 3).fault()
    assert "holds an output of another run: seed was 0, is 3" in seeded
    other = quant(tiny, tmp_path / "out", "--quant_type", "w8a16", *formats).fault()
    assert "the recipe's processors (another --quant_type or --config_path, or an edited file) changed" in other
    assert "finished already" not in quant(tiny, tmp_path / "out", *words, "--overwrite").done().err
    (config, *_) = (tmp_path / "out").rglob("config.json")
    config.unlink()
    assert "is not empty\n" in quant(tiny, tmp_path / "out", *words).fault()


@pytest.mark.parametrize("words", ["recipes list", "inspect {model}"])
def test_reader_that_has_enough_is_no_error(words: str, tiny: Path) -> None:
    """As with `| head`; here the reader has gone before the first line."""
    line = f"{sys.executable} -m msmodelslim_omni {words.format(model=tiny)}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line} | true"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == ""


def test_log_file_has_the_messages_and_the_error(tiny: Path, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    quant(tiny, tmp_path / "out", "--config_path", MINMAX, "--log_file", log, "--log_level", "error").done()
    quant(tiny, tmp_path / "out", "--config_path", MINMAX, "--seed", 1, "--log_file", log).fault()
    text = log.read_text()
    assert "device cpu (as requested)" in text and "layers 4/4" in text and "error: save_path" in text
    assert all(line[:2] == "20" for line in text.splitlines() if not line.startswith("  hint"))
    bad = tmp_path / "none" / "run.log"
    assert "cannot be written" in quant(tiny, tmp_path / "o2", "--config_path", MINMAX, "--log_file", bad).fault()


def test_faults_of_many_samples_share_a_line(tiny: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path, *({"txt": "a"} for _ in range(6)), {"text": "good"})
    message = quant(tiny, tmp_path / "out", "--dataset", index).fault()
    assert "the dataset has 6 errors:\nindex.jsonl:1, index.jsonl:2, index.jsonl:3 and 3 more: unknown key" in message
    answer = quant(tiny, tmp_path / "out", "--dataset", index, "--on_bad_sample", "skip", "--dry_run").done()
    assert answer.err.count("unknown key") == 1
