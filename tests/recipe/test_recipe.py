"""Recipes: accepted files, and errors with file:line, the key and the allowed values."""

from __future__ import annotations

import json
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.files.resources import shipped_folder
from msmodelslim_omni.models import MODEL_TYPES
from msmodelslim_omni.processors import PROCESSORS
from msmodelslim_omni.recipe.editor_schema import SCHEMA_FILE, recipe_schema
from msmodelslim_omni.recipe.loading import (
    MAX_RECIPE_BYTES,
    find_recipe,
    load_recipe,
    parse_recipe,
    resolve_recipe,
    shipped_recipes,
)
from msmodelslim_omni.recipe.processors import (
    AwqConfig,
    GroupConfig,
    IterSmoothConfig,
    LinearQuantConfig,
    SmoothQuantConfig,
)
from msmodelslim_omni.recipe.schema import Recipe

# The recipe that msModelSlim ships for this model.
MSMODELSLIM_RECIPE = (Path(__file__).parents[1] / "msmodelslim_recipe.yaml").read_text(encoding="utf-8")

# The smallest recipe. The tests refer to its line numbers.
MINIMAL = """\
apiversion: multimodal_vlm_modelslim_v1
metadata:
  config_id: minimal
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {}
        weight: {}
  save:
    - type: ascendv1_saver
"""


def parse_error(text: str) -> QuantError:
    with pytest.raises(QuantError) as caught:
        parse_recipe(text, Path("my.yaml"))
    return caught.value


def with_spec(**changes: Any) -> str:
    """Return MINIMAL as one line of flow YAML, with keys of spec replaced."""
    data = yaml.safe_load(MINIMAL)
    data["spec"].update(changes)
    return json.dumps(data)


def with_process(*processors: dict[str, Any]) -> str:
    return with_spec(process=list(processors))


QCONFIG: dict[str, Any] = {"act": {}, "weight": {}}


# --- accepted recipes ----------------------------------------------------------------------------------------


def test_recipe_of_msmodelslim_is_accepted_unchanged() -> None:
    recipe = parse_recipe(MSMODELSLIM_RECIPE)
    ((location, config),) = recipe.processors()
    assert location == ("spec", "process", 0)
    assert isinstance(config, LinearQuantConfig)
    assert (config.include, config.exclude) == (("*",), ("*audio_tower*", "*visual*"))
    assert (config.qconfig.weight.method, config.qconfig.act.scope) == ("minmax", "per_token")
    assert recipe.quant_type == "w8a8"
    assert recipe.metadata.verified_model_types == ("Qwen2.5-Omni-7B",)
    assert [saver.type for saver in recipe.spec.save] == ["ascendv1_saver"]
    assert recipe.spec.default_text == "What are the elements can you see and hear in these medias."
    assert PROCESSORS[config.type].needs(config) == ""  # data-free
    assert recipe.text == MSMODELSLIM_RECIPE


def test_minimal_recipe_has_the_defaults_of_msmodelslim() -> None:
    recipe = parse_recipe(MINIMAL)
    assert recipe.spec.dataset == "calibVideos"
    assert recipe.spec.default_text == "Describe this image in detail."
    assert recipe.spec.save[0].part_file_size == 4
    assert recipe.metadata.score == 100
    assert recipe.quant_type == ""
    assert recipe.spec.calibration.on_bad_sample == "fail"


def test_processor_defaults() -> None:
    recipe = parse_recipe(
        with_process({"type": "smooth_quant"}, {"type": "iter_smooth"}, {"type": "linear_quant", "qconfig": QCONFIG})
    )
    (_, smooth), (_, iterated), (_, linear) = recipe.processors()
    assert isinstance(smooth, SmoothQuantConfig) and smooth.alpha == 0.5
    assert isinstance(iterated, IterSmoothConfig)
    assert (iterated.alpha, iterated.scale_min) == (0.9, 1e-5)
    assert iterated.enable_subgraph_type == ("norm-linear", "linear-linear", "ov", "up-down")
    assert isinstance(linear, LinearQuantConfig) and linear.include == ("*",)


def test_int4_and_awq_defaults() -> None:
    weight = {"scope": "per_group", "dtype": "int4"}
    recipe = parse_recipe(with_process({"type": "awq"}, {"type": "linear_quant", "qconfig": {"weight": weight}}))
    (_, awq), (_, linear) = recipe.processors()
    assert isinstance(awq, AwqConfig) and awq.n_grid == 20 and awq.weight_qconfig is None
    assert awq.enable_subgraph_type == ("norm-linear", "ov", "up-down")
    assert isinstance(linear, LinearQuantConfig) and linear.qconfig.act is None
    assert (linear.qconfig.weight.group_size, linear.qconfig.weight.symmetric) == (128, True)
    assert linear.qconfig.weight.method == "minmax"


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("method", ["minmax", "mse", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_options(size: int, method: str, symmetric: bool) -> None:
    weight = {"scope": "per_group", "dtype": "int4", "symmetric": symmetric, "method": method}
    weight["ext"] = {"group_size": size}
    text = with_process({"type": "linear_quant", "qconfig": {"weight": weight}})
    ((_, config),) = parse_recipe(text).processors()
    assert isinstance(config, LinearQuantConfig)
    assert config.qconfig.weight.model_dump(exclude={"ext"}) == {k: v for k, v in weight.items() if k != "ext"}
    assert config.qconfig.weight.group_size == size


@pytest.mark.parametrize("weights", ["balanced", "tokens", {"text": 1.0, "audio": 0.0, "video": 2.5}, {"image": 1}])
def test_accepted_modality_weights(weights: Any) -> None:
    recipe = parse_recipe(with_spec(calibration={"modality_weights": weights}))
    assert recipe.spec.calibration.modality_weights == weights


@pytest.mark.parametrize("quant_type", ["w4a16", "W4A16", "awq", "AWQ"])
def test_awq_is_an_alias_of_w4a16(quant_type: str) -> None:
    for model in ("Qwen2.5-Omni-7B", "Qwen2.5-Omni-3B"):
        assert find_recipe(model, quant_type).metadata.config_id == "qwen2_5_omni_w4a16"


def test_group_is_flattened_in_order_with_locations() -> None:
    inner = [{"type": "smooth_quant", "alpha": "auto"}, {"type": "linear_quant", "qconfig": QCONFIG}]
    recipe = parse_recipe(with_process({"type": "iter_smooth"}, {"type": "group", "configs": inner}))
    assert isinstance(recipe.spec.process[1], GroupConfig)
    assert [(location, config.type) for location, config in recipe.processors()] == [
        (("spec", "process", 0), "iter_smooth"),
        (("spec", "process", 1, "configs", 0), "smooth_quant"),
        (("spec", "process", 1, "configs", 1), "linear_quant"),
    ]


def test_where_returns_the_line() -> None:
    recipe = parse_recipe(MINIMAL, Path("my.yaml"))
    assert recipe.where() == "my.yaml:1"
    assert recipe.where(("spec", "process")) == "my.yaml:5"
    assert recipe.where(("spec", "process", 0, "qconfig", "weight")) == "my.yaml:9"
    assert recipe.where(("spec", "save", 0, "type")) == "my.yaml:11"
    assert recipe.where(("spec", "save", 7)) == "my.yaml:10"  # a missing item: the line of its parent


def test_unknown_top_level_key_needs_an_anchor() -> None:
    parse_recipe("x-anything: &a {act: {}, weight: {}}\n" + MINIMAL)
    parse_recipe("holder:\n  deep:\n    - &a 5\n" + MINIMAL)
    assert "unknown key" in parse_error("holder: 5\n" + MINIMAL).message


def test_key_that_only_uses_an_anchor_is_unknown() -> None:
    text = MINIMAL.replace("act: {}", "act: &a {}") + "user: *a\n"
    assert "my.yaml:12: user: unknown key" in parse_error(text).message


def test_known_key_may_hold_an_anchor() -> None:
    assert parse_recipe(MINIMAL.replace("metadata:", "metadata: &m")).metadata.config_id == "minimal"


def test_merge_keys() -> None:
    text = MINIMAL.replace("weight: {}", "weight: {<<: *w, method: mse}")
    recipe = parse_recipe("base: &w {scope: per_channel, dtype: int8}\n" + text)
    ((_, config),) = recipe.processors()
    assert isinstance(config, LinearQuantConfig) and config.qconfig.weight.method == "mse"


def test_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe(MINIMAL).spec.dataset = "other"  # type: ignore[misc]


# --- errors --------------------------------------------------------------------------------------------------

SUPPORTED = ("linear_quant", "smooth_quant", "iter_smooth", "awq", "group")

ERRORS: list[tuple[str, str, str, tuple[str, ...]]] = [
    # text in MINIMAL, its replacement; line and key; words of the message
    ("  config_id: minimal", "  config_ip: mine", "my.yaml:3: metadata.config_ip", ("unknown key", "'config_id'")),
    ("        act: {}", "        act: {scoop: x}", "my.yaml:8: spec.process[0].qconfig.act.scoop", ("scope",)),
    ("act: {}", "act: {scope: per_tensor}", "my.yaml:8", ("act.scope", "'per_tensor'", "'per_token'")),
    ("act: {}", "act: {scope: per_tensor}", "my.yaml:8", ("act.scope", "worse than per_token", "docs/schemes.md")),
    ("act: {}", "act: {dtype: int4}", "my.yaml:8", ("act.dtype", "'int4'", "allowed: 'int8'")),
    ("act: {}", "act: {symmetric: False}", "my.yaml:8", ("act.symmetric", "False", "allowed: True")),
    ("act: {}", "act: {method: mse}", "my.yaml:8", ("act.method", "'mse'", "'minmax'")),
    ("weight: {}", "weight: {method: ssz}", "my.yaml:9", ("weight.method", "'ssz'", "'minmax', 'mse' or 'gptq'")),
    ("weight: {}", "weight: {scope: per_tensor}", "my.yaml:9", ("weight.scope", "'per_group' or 'per_block'")),
    ("weight: {}", "weight: {ext: {step: 2}}", "my.yaml:9", ("weight.ext",)),
    ("      qconfig:", "      qkonfig:", "my.yaml:7: spec.process[0].qkonfig", ("unknown key", "'qconfig'")),
    ("        weight: {}\n", "", "my.yaml:7: spec.process[0].qconfig.weight", ("this key is missing",)),
    ("  save:\n    - type: ascendv1_saver\n", "", "my.yaml:4: spec.save", ("this key is missing",)),
    ("- type: linear_quant", "- type: linear_quantt", "my.yaml:6", (*SUPPORTED, "Did you mean 'linear_quant'?")),
    ("- type: linear_quant", "- type: quarot", "my.yaml:6: processor 'quarot'", ("is not supported", *SUPPORTED)),
    ("    - type: linear_quant\n      qconfig", "    - qconfig", "my.yaml:6", ("`type` is missing",)),
    ("ascendv1_saver", "ascend_saver", "my.yaml:11: saver 'ascend_saver'", ("compressed_tensors", "Did you mean")),
    ("ascendv1_saver", "mindie_format_saver", "my.yaml:11: saver 'mindie_format_saver'", ("not supported",)),
    ("_saver\n", "_saver\n      part_file_size: -1\n", "my.yaml:12: spec.save[0].part_file_size", ("'-1'",)),
    ("_saver\n", "_saver\n      part_file_size: 1.5\n", "my.yaml:12: spec.save[0].part_file_size", ("integer",)),
    ("_saver\n", "_saver\n      part_file_size: '4'\n", "my.yaml:12: spec.save[0].part_file_size", ("integer",)),
    ("_saver\n", "_saver\n      size: 4\n", "my.yaml:12: spec.save[0].size", ("part_file_size",)),
    ("_saver\n", "_saver\n    - type: ascendv1_saver\n", "my.yaml:10: spec.save", ("same saver twice",)),
    ("    - type: ascendv1_saver\n", "    []\n", "my.yaml:10: spec.save", ("at least 1",)),
    ("_saver\n", "_saver\n  dataset: ''\n", "my.yaml:12: spec.dataset", ("at least 1 character",)),
    ("_saver\n", "_saver\n  dataset: 5\n", "my.yaml:12: spec.dataset is '5'", ("string",)),
    ("_saver\n", "_saver\n  default_text: ''\n", "my.yaml:12: spec.default_text", ("at least 1 character",)),
    ("_saver\n", "_saver\n  data_set: x\n", "my.yaml:12: spec.data_set", ("unknown key", "'dataset'")),
    ("_saver\n", "_saver\n  runner: model_wise\n", "my.yaml:12: spec.runner", ("'auto' or 'layer_wise'",)),
    ("_saver\n", "_saver\n  prior: []\n", "my.yaml:12: spec.prior", ("unknown key",)),
    ("_saver\n", "_saver\n  calibration: {max_samples: 0}\n", "my.yaml:12: spec.calibration.max_samples", ("'0'",)),
    ("_saver\n", "_saver\n  calibration: {max_pixels: 100}\n", "my.yaml:12: spec.calibration.max_pixels", ("3136",)),
    ("_saver\n", "_saver\n  calibration: {video_fps: 0}\n", "my.yaml:12: spec.calibration.video_fps", ("'0'",)),
    ("_saver\n", "_saver\n  calibration: {video_fps: 31}\n", "my.yaml:12: spec.calibration.video_fps", ("30",)),
    ("_saver\n", "_saver\n  calibration: {propagate_error: 1}\n", "my.yaml:12: spec.calibration", ("propagate_error",)),
    ("_saver\n", "_saver\n  calibration: {max_tokens: yes}\n", "my.yaml:12: spec.calibration.max_tokens", ("int",)),
    (
        "_saver\n",
        "_saver\n  calibration: {on_bad_sample: ignore}\n",
        "my.yaml:12: spec.calibration.on_bad_sample",
        ("'fail' or 'skip'",),
    ),
    ("  config_id: minimal", "  score: -1", "my.yaml:3: metadata.score", ("'-1'",)),
    ("  config_id: minimal", "  label: {w_bit: 8}", "my.yaml:3: metadata.label.a_bit", ("missing",)),
    ("  config_id: minimal", "  label: {w_bit: 99, a_bit: 8}", "my.yaml:3: metadata.label.w_bit", ("16",)),
    ("  config_id: minimal", "  verified_model_types: x", "my.yaml:3: metadata.verified_model_types", ("a list",)),
    ("  config_id: minimal", "  5", "my.yaml:2: metadata is '5'", ()),
    ("multimodal_vlm_modelslim_v1", "modelslim_v1", "my.yaml:1: apiversion", ("'multimodal_vlm_modelslim_v1'",)),
    ("      qconfig:", "      include: []\n      qconfig:", "my.yaml:7: spec.process[0].include", ("at least one",)),
    ("      qconfig:", "      include: ['*', 5]\n      qconfig:", "my.yaml:7: spec.process[0].include", ("string",)),
    ("      qconfig:", "      exclude: 'x'\n      qconfig:", "my.yaml:7: spec.process[0].exclude", ("e.g. ['x']",)),
    ("      qconfig:", "      alpha: 0.5\n      qconfig:", "my.yaml:7: spec.process[0].alpha", ("unknown key",)),
    ("spec:\n", "spek:\n", "my.yaml:4: spek", ("unknown key", "'spec'")),
    ("spec:\n", "spek:\n", "my.yaml:1: spec", ("this key is missing",)),
    ("apiversion: multimodal_vlm_modelslim_v1\n", "", "my.yaml:1: apiversion", ("missing",)),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "where", "words"), ERRORS)
def test_error_names_line_key_and_allowed_values(old: str, new: str, where: str, words: tuple[str, ...]) -> None:
    assert MINIMAL.count(old) == 1
    error = parse_error(MINIMAL.replace(old, new))
    (line, *_) = [line for line in error.message.split("\n") if line.startswith(where)] or [error.message]
    assert line.startswith(where)
    for word in words:
        assert word in line
    assert "recipes show" in error.hint and "recipes schema" in error.hint


@pytest.mark.parametrize(
    ("weight", "key", "words"),
    [
        ("{dtype: int4, symmetric: False}", "weight", "int4 per_channel requires method minmax or mse"),
        ("{scope: per_group}", "weight", "int8 requires scope per_channel; nf4 requires scope per_group"),
        ("{symmetric: False}", "weight", "int8 weights are symmetric"),
        ("{ext: {group_size: 64}}", "weight", "ext.group_size requires scope per_group"),
        ("{scope: per_group, dtype: int4, ext: {group_size: 96}}", "weight.ext.group_size", "32, 64 or 128"),
        ("{scope: per_group, dtype: int4, ext: {group_size: '64'}}", "weight.ext.group_size", "32, 64 or 128"),
        ("{scope: per_group, dtype: int4, ext: {groupsize: 64}}", "weight.ext.groupsize", "'group_size'"),
        ("{scope: per_group, dtype: int4, method: awq}", "weight.method", "'gptq'"),
        ("{scope: per_group, dtype: int3}", "weight.dtype", "'nf4', 'fp8_e4m3' or 'nvfp4'"),
    ],
)
def test_weight_error(weight: str, key: str, words: str) -> None:
    message = parse_error(MINIMAL.replace("weight: {}", f"weight: {weight}")).message
    assert message.startswith(f"my.yaml:9: spec.process[0].qconfig.{key}") and words in message


def test_int4_with_int8_activations() -> None:
    error = parse_error(MINIMAL.replace("weight: {}", "weight: {scope: per_group, dtype: int4}"))
    assert error.message.startswith("my.yaml:7: spec.process[0].qconfig")
    assert "int4 weights require float activations; remove `act`" in error.message


@pytest.mark.parametrize(
    ("weights", "key", "words"),
    [
        ("loud", " is 'loud'", "'balanced' or 'tokens'"),
        ("[text]", " is ['text']", "'balanced' or 'tokens'"),
        ("{smell: 1}", ".smell", "'text', 'image', 'audio' or 'video'"),
        ("{text: -1}", ".text is '-1'", "greater than or equal to 0"),
        ("{text: .inf}", ".text is 'inf'", "finite"),
        ("{text: much}", ".text is 'much'", "number"),
    ],
)
def test_modality_weight_error(weights: str, key: str, words: str) -> None:
    message = parse_error(MINIMAL + f"  calibration: {{modality_weights: {weights}}}\n").message
    assert message.startswith(f"my.yaml:12: spec.calibration.modality_weights{key}")
    assert words in message and "dict[" not in message


@pytest.mark.parametrize(
    ("processor", "words"),
    [
        ({"type": "iter_smooth", "alpha": 1.5}, ("alpha", "'1.5'", "1", "'auto'")),
        ({"type": "iter_smooth", "alpha": -0.1}, ("alpha", "greater than or equal to 0")),
        ({"type": "iter_smooth", "alpha": "fast"}, ("alpha", "'fast'", "'auto'")),
        ({"type": "iter_smooth", "alpha": None}, ("alpha",)),
        ({"type": "iter_smooth", "scale_min": 0}, ("scale_min", "greater than 0")),
        ({"type": "iter_smooth", "enable_subgraph_type": ["norm"]}, ("enable_subgraph_type", "'norm'", "'ov'")),
        ({"type": "iter_smooth", "symmetric": False}, ("symmetric", "True")),
        ({"type": "smooth_quant", "scale_min": 1e-5}, ("scale_min", "unknown key", "alpha")),
        ({"type": "smooth_quant", "symmetric": "yes"}, ("symmetric",)),
        ({"type": "group", "configs": []}, ("configs", "at least 1")),
        ({"type": "group"}, ("configs", "missing")),
        ({"type": "group", "configs": [{"type": "group", "configs": []}]}, ("'group'", "not supported")),
        ({"type": "group", "configs": [{"type": "gptq"}]}, ("processor 'gptq'", "linear_quant")),
        ({"type": "awq", "n_grid": 0}, ("n_grid", "'0'", "greater than or equal to 1")),
        ({"type": "awq", "n_grid": 1000}, ("n_grid", "100")),
        ({"type": "awq", "enable_subgraph_type": ["linear-linear"]}, ("enable_subgraph_type", "'ov'", "'up-down'")),
        ({"type": "awq", "alpha": 0.5}, ("alpha", "unknown key", "n_grid")),
        (
            {"type": "awq", "weight_qconfig": {"dtype": "int4"}},
            ("weight_qconfig", "awq requires scope per_group"),
        ),
        ({"type": "awq", "include": []}, ("include", "at least one")),
        ({"type": "linear_quant"}, ("qconfig", "missing")),
        ({"type": "linear_quant", "qconfig": None}, ("qconfig",)),
        ({"type": ["linear_quant"]}, ("processor", "is not supported", "linear_quant")),
    ],
)
def test_processor_error(processor: dict[str, Any], words: tuple[str, ...]) -> None:
    error = parse_error(with_process(processor))
    assert error.message.startswith("my.yaml:1: ")
    for word in words:
        assert word in error.message
    assert "\n" not in error.message  # one line per error


def test_float_alpha_may_be_written_as_an_integer() -> None:
    recipe = parse_recipe(with_process({"type": "iter_smooth", "alpha": 1}))
    assert next(recipe.processors())[1].alpha == 1.0  # type: ignore[union-attr]


@pytest.mark.parametrize("number", [".nan", ".inf"])
def test_alpha_must_be_finite(number: str) -> None:
    text = MINIMAL.replace(
        "- type: linear_quant", f"- {{type: smooth_quant, alpha: {number}}}\n    - type: linear_quant"
    )
    assert "alpha" in parse_error(text).message


def test_all_errors_are_reported_at_once() -> None:
    text = MINIMAL.replace("act: {}", "act: {dtype: int4}").replace("config_id", "konfig")
    lines = parse_error(text).message.split("\n")
    assert [line.split(": ")[0] for line in sorted(lines)] == ["my.yaml:3", "my.yaml:8"]


def test_at_most_ten_errors_are_reported() -> None:
    extra = "".join(f"  key{i}: 1\n" for i in range(300))
    assert len(parse_error(MINIMAL.replace("  config_id: minimal\n", extra)).message.split("\n")) == 10


# --- files that are not recipes -------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a recipe must be a mapping"),
        ("- a\n- b\n", "a recipe must be a mapping with apiversion, metadata and spec"),
        ("just text", "a recipe must be a mapping"),
        ("a: b: c", "my.yaml:1: not valid YAML: mapping values are not allowed here"),
        (MINIMAL + "x: [1,\n", "not valid YAML"),
        (MINIMAL + "\tx: 1\n", "my.yaml:12: not valid YAML"),
        (MINIMAL + "x: *nowhere\n", "my.yaml:12: not valid YAML: found undefined alias"),
        (MINIMAL + "---\na: 1\n", "not valid YAML"),
        (MINIMAL + "x: \x07\n", "not valid YAML"),
        (MINIMAL + "spec: {}\n", "my.yaml:12: key 'spec' appears twice"),
        (MINIMAL.replace("act: {}", "act: {dtype: int8, dtype: int8}"), "my.yaml:8: key 'dtype' appears twice"),
        (MINIMAL + BOMB, "expanded YAML is too large for a recipe"),
        (MINIMAL + "x: &x [*x]\n", "expanded YAML is too large for a recipe"),
        (MINIMAL + "x: &x {y: *x}\n", "expanded YAML is too large for a recipe"),
        ("[" * 100_000, "nested too deeply"),
        ("a: " + "[" * 60 + "]" * 60, "expanded YAML is too large for a recipe"),
        (MINIMAL + "5: 6\n", "my.yaml:12"),
    ],
)
def test_file_that_is_not_a_recipe(text: str, words: str) -> None:
    start = time.monotonic()
    error = parse_error(text)
    assert words in error.message
    assert error.message.startswith("my.yaml")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system [touch executed]",
        "!!python/name:os.system",
        "!!python/tuple [1]",
        "!custom 1",
        "!!int abc",
        "!!int ''",
        "!!float abc",
        "!!bool maybe",
        "!!timestamp noon",
        "!!omap 3",
        "2001-99-99",
        "{[a]: b}",
        "{<<: 5}",
    ],
)
def test_values_that_the_yaml_library_cannot_build(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags that would run code, and values that make the YAML library fail, give one message with the line."""
    monkeypatch.chdir(tmp_path)
    error = parse_error(MINIMAL.replace("config_id: minimal", f"config_id: {value}"))
    assert error.message.startswith("my.yaml:3: ")
    assert list(tmp_path.iterdir()) == []


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_file_errors(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "none.yaml", "does not exist. Shipped recipes: "),
        (tmp_path, "cannot read the recipe"),
        (write(tmp_path / "latin.yaml", b"# caf\xe9\n" + MINIMAL.encode()), "cannot read the recipe"),
        (write(tmp_path / "big.yaml", b"#" * (2 << 20)), f"the limit is {MAX_RECIPE_BYTES}"),
    ):
        with pytest.raises(QuantError) as caught:
            load_recipe(path)
        assert words in caught.value.message
        assert str(path) in caught.value.message


def test_recipe_keeps_path_and_text(tmp_path: Path) -> None:
    path = write(tmp_path / "我的 recipe.yaml", MINIMAL.encode())
    recipe = load_recipe(str(path))
    assert recipe.path == path
    assert recipe.text == MINIMAL
    assert recipe.where(("spec",)) == f"{path}:4"


@given(st.text(alphabet="abtyps:-[]{}&*!|>'\"#%@,\n 0159.~?<", max_size=80))
@settings(max_examples=150, deadline=2000)
def test_fuzz_text(text: str) -> None:
    only_quant_errors(text)
    only_quant_errors(MINIMAL + text)


LINES = st.sampled_from(MINIMAL.split("\n"))
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("linear_quant"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "act", "include", "spec", "alpha", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.lists(LINES, max_size=14))
@settings(max_examples=80, deadline=2000)
def test_fuzz_lines(lines: list[str]) -> None:
    only_quant_errors("\n".join(lines))


@given(
    st.sampled_from(["apiversion", "metadata", "spec", "process", "save", "dataset", "calibration", "runner"]),
    TREES,
)
@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.too_slow])
def test_fuzz_values(key: str, value: Any) -> None:
    data = yaml.safe_load(MINIMAL)
    (data if key in ("apiversion", "metadata", "spec") else data["spec"])[key] = value
    only_quant_errors(yaml.safe_dump(data))


def only_quant_errors(text: str) -> None:
    try:
        parse_recipe(text)
    except QuantError as error:
        assert error.message


# --- shipped recipes -----------------------------------------------------------------------------------------


def test_every_shipped_recipe_validates() -> None:
    names = {recipe.metadata.config_id: recipe for recipe in shipped_recipes()}
    files = {path.stem for path in shipped_folder("configs").glob("*.yaml")}
    assert files == set(names)  # config_id is the file's name
    assert {"qwen2_5_omni_w8a8", "qwen2_5_omni_w8a8_minmax"} <= files
    for recipe in names.values():
        assert recipe.quant_type
        assert set(recipe.metadata.verified_model_types) <= set(MODEL_TYPES)


def needs_data(recipe: Recipe) -> bool:
    return any(PROCESSORS[config.type].needs(config) for _, config in recipe.processors())


def test_minmax_recipe_is_data_free_and_the_default_is_not() -> None:
    assert needs_data(find_recipe("Qwen2.5-Omni-7B", "w8a8"))
    assert not needs_data(resolve_recipe("qwen2_5_omni_w8a8_minmax"))


def test_highest_score_comes_first() -> None:
    scores = [recipe.metadata.score for recipe in shipped_recipes()]
    assert scores == sorted(scores, reverse=True)
    for model in ("Qwen2.5-Omni-7B", "Qwen2.5-Omni-3B"):
        best = find_recipe(model, "w8a8")
        assert best.metadata.config_id == "qwen2_5_omni_w8a8"
        candidates = [r for r in shipped_recipes() if r.quant_type == "w8a8"]
        assert best.metadata.score == max(r.metadata.score for r in candidates)


def test_quant_type_in_capitals() -> None:
    assert find_recipe("Qwen2.5-Omni-7B", "W8A8").metadata.config_id == "qwen2_5_omni_w8a8"


@pytest.mark.parametrize(("quant_type", "model_type"), [("w8a", "Qwen2.5-Omni-7B"), ("w8a88", "Qwen2.5-Omni-3B")])
def test_unknown_quant_type(quant_type: str, model_type: str) -> None:
    with pytest.raises(QuantError) as caught:
        find_recipe(model_type, quant_type)
    message = caught.value.message
    assert f"quant_type {quant_type!r} and model_type {model_type!r}" in message
    assert "Quant types with a recipe: fp8, fp8_block, nf4, nvfp4, nvfp4a16, w4a16, w8a16, w8a8." in message
    assert "Did you mean 'w8a8'?" in message
    assert "--config_path" in caught.value.hint


def test_no_recipe_for_a_model() -> None:
    with pytest.raises(QuantError, match="Quant types with a recipe: none"):
        find_recipe("Other", "w8a8")


@pytest.mark.parametrize("name", ["qwen2_5_omni_w8a8", "qwen2_5_omni_w8a8.yaml"])
def test_recipe_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_recipe(name).metadata.config_id == "qwen2_5_omni_w8a8"


def test_file_takes_precedence_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "qwen2_5_omni_w8a8", MINIMAL.encode())
    assert resolve_recipe("qwen2_5_omni_w8a8").metadata.config_id == "minimal"


@pytest.mark.parametrize("name", ["qwen2_5_omni_w8a8x", "elsewhere/qwen2_5_omni_w8a8.yaml", "x.yaml"])
def test_unknown_recipe(name: str) -> None:
    with pytest.raises(QuantError) as caught:
        resolve_recipe(name)
    assert f"recipe {name!r} does not exist" in caught.value.message
    assert "qwen2_5_omni_w8a8_minmax" in caught.value.message
    if name.startswith("qwen"):
        assert "Did you mean 'qwen2_5_omni_w8a8'?" in caught.value.message


# --- the schema ----------------------------------------------------------------------------------------------


def test_schema_for_editors() -> None:
    schema = json.loads(json.dumps(recipe_schema()))
    assert schema["type"] == "object"
    assert set(schema["required"]) == {"apiversion", "spec"}
    assert set(schema["properties"]) == {"apiversion", "metadata", "spec"}
    assert schema["$id"].startswith("urn:msmodelslim_omni:") and schema["$schema"].endswith("2020-12/schema")
    blocks = schema["$defs"]
    assert all(block["additionalProperties"] is False for block in blocks.values())
    assert set(blocks["WeightConfig"]["properties"]["method"]["enum"]) == {"minmax", "mse", "gptq"}


def test_schema_is_shipped_as_a_file() -> None:
    """`msmodelslim recipes schema > msmodelslim_omni/recipe/recipe.schema.json` writes it again."""
    shipped = files("msmodelslim_omni.recipe").joinpath(SCHEMA_FILE).read_text(encoding="utf-8")
    assert json.loads(shipped) == json.loads(json.dumps(recipe_schema()))


def test_every_key_of_the_schema_has_a_description() -> None:
    schema = recipe_schema()
    blocks = {"Recipe": schema, **schema["$defs"]}
    assert all(block["description"] for block in blocks.values())
    without = [f"{b}.{k}" for b, block in blocks.items() for k, v in block["properties"].items() if not has_text(v)]
    assert without == []


def has_text(field: dict[str, Any]) -> bool:
    return bool(field.get("description"))


def test_choices_of_the_schema_are_conditions() -> None:
    """An editor reports the faults of the processor that `type` names, not those of the first one."""
    schema = recipe_schema()
    assert "oneOf" not in json.dumps(schema) and "discriminator" not in json.dumps(schema)
    item = schema["$defs"]["Spec"]["properties"]["process"]["items"]
    assert item["properties"]["type"]["enum"] == ["awq", "group", "iter_smooth", "linear_quant", "smooth_quant"]
    assert {"$ref": "#/$defs/AwqConfig"} in [branch["then"] for branch in item["allOf"]]


def test_top_level_of_the_schema_is_closed_but_for_anchored_blocks() -> None:
    """A misspelt `metadata` is none of the blocks that may carry an anchor."""
    allowed = recipe_schema()["additionalProperties"]["anyOf"]
    assert {"$ref": "#/$defs/LinearQConfig"} in allowed and {"type": "array"} in allowed
    assert {"$ref": "#/$defs/Metadata"} not in allowed and {"$ref": "#/$defs/Spec"} not in allowed


def test_every_reference_of_the_schema_resolves() -> None:
    schema = recipe_schema()
    names = set(find_references(schema))
    assert names
    assert names <= {f"#/$defs/{name}" for name in schema["$defs"]}


def find_references(node: Any) -> list[str]:
    if isinstance(node, dict):
        direct = [node["$ref"]] if "$ref" in node else []
        return direct + [ref for value in node.values() for ref in find_references(value)]
    return [ref for value in node for ref in find_references(value)] if isinstance(node, list) else []


def test_schema_has_every_key_of_the_shipped_recipes() -> None:
    schema = recipe_schema()
    known = {key for block in [schema, *schema["$defs"].values()] for key in block.get("properties", {})}
    for recipe in shipped_recipes():
        data = yaml.safe_load(recipe.text)
        assert all_keys({key: data[key] for key in ("apiversion", "metadata", "spec")}) <= known


def all_keys(node: Any) -> set[str]:
    if isinstance(node, dict):
        return set(node).union(*map(all_keys, node.values()))
    return set().union(*map(all_keys, node)) if isinstance(node, list) else set()
