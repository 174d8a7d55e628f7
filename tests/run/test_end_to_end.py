"""The quant command on the tiny Omni in both formats. The outputs are compared with independent arithmetic."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command import (
    DATA,
    MINMAX,
    change_recipe,
    command,
    fast_recipe,
    files,
    mixed_index,
    prepared_samples,
    quant,
    thinker_inputs,
    write_index,
)
from make_tiny_omni import make_tiny_omni
from refinement import ALL_STEPS, steps
from safetensors.torch import load_file

from msmodelslim_omni.calibration.token_roles import assign_roles
from msmodelslim_omni.models import qwen2_5_omni as omni
from msmodelslim_omni.numerics.arithmetic import QuantizedLinear
from msmodelslim_omni.numerics.scheme import QuantScheme
from msmodelslim_omni.run.emulation import emulate

Tensors = dict[str, torch.Tensor]
ASCEND, COMPRESSED = "ascendv1_saver", "compressed_tensors"
LAYERS = 4
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OUR_FILES = {"config.json", "quant_report.json", "quant_report.md", "README.md"}


# --- the runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed_index(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def smoothed(tiny: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default recipe in both formats, written by one run."""
    save = tmp_path_factory.mktemp("runs") / "smoothed"
    formats = ("--save_format", ASCEND, "--save_format", COMPRESSED)
    with steps(ALL_STEPS):
        quant(tiny, save, "--quant_type", "w8a8", "--dataset", index, *formats).done()
    return save


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data-free recipe. Its only saver writes directly to save_path."""
    save = tmp_path_factory.mktemp("runs") / "plain"
    quant(tiny, save, "--config_path", MINMAX).done()
    return save


def load_checkpoint(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def linear_names() -> list[str]:
    parents = dict.fromkeys(LINEARS[:4], "self_attn") | dict.fromkeys(LINEARS[4:], "mlp")
    return [f"thinker.model.layers.{i}.{parent}.{name}" for i in range(LAYERS) for name, parent in parents.items()]


# --- files and tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "own"),
    [
        (ASCEND, {"quant_model_weights.safetensors", "quant_model_description.json"}),
        (COMPRESSED, {"model.safetensors"}),
    ],
)
def test_other_files_of_the_source_are_copied_unchanged(tiny: Path, smoothed: Path, name: str, own: set[str]) -> None:
    before = {f.name: f.read_bytes() for f in tiny.iterdir() if "safetensors" not in f.name}
    after = {f.name: f.read_bytes() for f in (smoothed / name).iterdir()}
    recipe = "qwen2_5_omni_w8a8.yaml"
    assert set(after) == set(before) | OUR_FILES | own | {recipe}
    assert "spk_dict.pt" in before and "tokenizer.json" in before
    for file in set(before) - {"config.json"}:
        assert after[file] == before[file], file
    assert after[recipe].decode() == (Path(omni.__file__).parents[2] / "configs" / recipe).read_text(encoding="utf-8")
    assert {f.name for f in smoothed.iterdir()} == {ASCEND, COMPRESSED}


def test_only_decoder_linears_are_quantized(tiny: Path, smoothed: Path) -> None:
    source = load_checkpoint(tiny)
    norms = {f"thinker.model.layers.{i}.{n}.weight" for i in range(LAYERS) for n in omni_norms()}
    biases = {f"{name}.bias" for name in linear_names() if f"{name}.bias" in source}
    for saver in (ASCEND, COMPRESSED):
        written = load_checkpoint(smoothed / saver)
        integers = {name.removesuffix(".weight") for name, t in written.items() if t.dtype == torch.int8}
        assert integers == set(linear_names())
        extra = {n for n in written if n not in source}
        suffixes = ("weight_scale", "weight_offset") if saver == ASCEND else ("weight_scale",)
        assert extra == {f"{name}.{suffix}" for name in linear_names() for suffix in suffixes}
        assert set(source) <= set(written)
        kept = set(source) - {f"{n}.weight" for n in linear_names()} - norms - biases
        for name in kept:
            assert written[name].dtype == source[name].dtype, name
            assert torch.equal(written[name].view(torch.uint8), source[name].view(torch.uint8)), name
        for name in norms | (biases if saver == COMPRESSED else set()):
            assert written[name].dtype == source[name].dtype, name
        assert any(not torch.equal(written[name], source[name]) for name in norms), "no norm was smoothed"


def omni_norms() -> tuple[str, str]:
    return "input_layernorm", "post_attention_layernorm"


def test_data_free_output_keeps_every_float_tensor(tiny: Path, plain: Path) -> None:
    source, written = load_checkpoint(tiny), load_checkpoint(plain)
    for name in set(source) - {f"{n}.weight" for n in linear_names()}:
        same = source[name].float() if name.removesuffix(".bias") in linear_names() else source[name]
        assert written[name].dtype == same.dtype and torch.equal(written[name], same), name


def test_ascend_description_lists_every_tensor(tiny: Path, smoothed: Path, plain: Path) -> None:
    for folder in (smoothed / ASCEND, plain):
        tensors = load_checkpoint(folder)
        description = load_json(folder / "quant_model_description.json")
        fields = {"version", "model_quant_type", "metadata", "group_size", "optional"}
        assert set(description) == set(tensors) | fields
        assert description["model_quant_type"] == "W8A8_DYNAMIC" and description["version"] == "1.0.0"
        for name in tensors:
            quantized = name.rpartition(".")[0] in linear_names() and not name.endswith(".bias")
            assert description[name] == ("W8A8_DYNAMIC" if quantized else "FLOAT"), name
        for name in linear_names():
            rows = tensors[f"{name}.weight"].shape[0]
            for suffix in ("weight_scale", "weight_offset"):
                assert tensors[f"{name}.{suffix}"].dtype == torch.float32
                assert tensors[f"{name}.{suffix}"].shape == (rows, 1)
            assert not tensors[f"{name}.weight_offset"].any() and (tensors[f"{name}.weight_scale"] > 0).all()
        assert load_json(folder / "config.json") == load_json(tiny / "config.json")


def test_compressed_tensors_config_is_in_both_places(tiny: Path, smoothed: Path) -> None:
    config = load_json(smoothed / COMPRESSED / "config.json")
    quantization = config.pop("quantization_config")
    assert config["thinker_config"].pop("quantization_config") == quantization
    assert config == load_json(tiny / "config.json")
    assert quantization["quant_method"] == "compressed-tensors" and quantization["format"] == "int-quantized"
    group = quantization["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"]["strategy"] == "channel" and group["input_activations"]["strategy"] == "token"
    ignore = [re.compile(pattern.removeprefix("re:")) for pattern in quantization["ignore"]]
    modules = {n.rpartition(".")[0] for n, t in load_checkpoint(tiny).items() if n.endswith(".weight") and t.ndim == 2}
    for name in modules - {"thinker.model.embed_tokens"}:
        ignored = any(pattern.match(name) for pattern in ignore)
        assert ignored != (name in linear_names()), name
    assert any(pattern.match("visual.blocks.0.attn.qkv") for pattern in ignore), "vLLM's fused name"


def test_both_formats_hold_the_same_integers(smoothed: Path) -> None:
    ascend, compressed = load_checkpoint(smoothed / ASCEND), load_checkpoint(smoothed / COMPRESSED)
    for name in linear_names():
        assert torch.equal(ascend[f"{name}.weight"], compressed[f"{name}.weight"])
        scale = compressed[f"{name}.weight_scale"]
        assert torch.equal(ascend[f"{name}.weight_scale"], scale.to(torch.float32))
        if f"{name}.bias" in ascend:
            assert torch.equal(ascend[f"{name}.bias"], compressed[f"{name}.bias"].float())


def test_data_free_weights_are_within_half_a_step(tiny: Path, plain: Path) -> None:
    source, written = load_checkpoint(tiny), load_checkpoint(plain)
    for name in linear_names():
        weight, scale = source[f"{name}.weight"].double(), written[f"{name}.weight_scale"].double()
        codes = written[f"{name}.weight"].double()
        assert ((codes * scale - weight).abs() <= scale * 0.5 * (1 + 1e-5)).all(), name
        # The scale is absmax / 127, so every row reaches the end of the range and none exceeds it.
        assert (codes.abs().amax(1) == 127).all(), name


# --- outputs of the quantized model --------------------------------------------------------------------------


class IntegerLinear(torch.nn.Module):
    """y = (q_x @ q_w^T) s_x s_w + b with the product in int64, written from the specification of the formats."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.codes, self.scale, self.bias = codes.long(), scale.float().flatten(), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s_x = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        q_x = (x / s_x).round().long()
        y = (q_x @ self.codes.T).float() * s_x * self.scale
        return y if self.bias is None else y + self.bias.float()


def decoder(thinker: Any) -> Any:
    return getattr(thinker.model, "language_model", thinker.model)


def load_thinker(tiny: Path) -> Any:
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32).eval()


def with_quantized_layers(tiny: Path, written: Tensors, make: Callable[[Tensors, str], torch.nn.Module]) -> Any:
    """The float thinker with the norms of an output, and its Linears built by `make`."""
    thinker = load_thinker(tiny)
    for number, layer in enumerate(decoder(thinker).layers):
        prefix = f"thinker.model.layers.{number}."
        for norm in omni_norms():
            layer.get_submodule(norm).weight.data = written[f"{prefix}{norm}.weight"].float()
        for name in linear_names():
            if name.startswith(prefix):
                parent, _, child = name.removeprefix(prefix).rpartition(".")
                setattr(layer.get_submodule(parent), child, make(written, name))
    return thinker


def integer_linear(written: Tensors, name: str) -> torch.nn.Module:
    return IntegerLinear(written[f"{name}.weight"], written[f"{name}.weight_scale"], written.get(f"{name}.bias"))


def dequantized_linear(written: Tensors, name: str) -> torch.nn.Module:
    weight = written[f"{name}.weight"].float() * written[f"{name}.weight_scale"].float()
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=f"{name}.bias" in written)
    linear.weight.data = weight
    if linear.bias is not None:
        linear.bias.data = written[f"{name}.bias"].float()
    return linear.requires_grad_(False)


def emulated_linear(written: Tensors, name: str) -> torch.nn.Module:
    holder = torch.nn.Module()
    holder.linear = torch.nn.Identity()
    scheme = QuantScheme(8, 8)
    quantized = QuantizedLinear(written[f"{name}.weight"], written[f"{name}.weight_scale"].float(), scheme)
    biases = {"linear.bias": written[f"{name}.bias"].float()} if f"{name}.bias" in written else {}
    emulate(holder, {"linear": quantized}, biases)
    return holder.linear


@pytest.fixture(scope="module")
def samples(tiny: Path, index: Path) -> list[dict[str, Any]]:
    """The calibration samples as keyword arguments of the thinker."""
    return thinker_inputs(tiny, index, 200704)


@torch.inference_mode()
def logits(thinker: Any, samples: list[dict[str, Any]]) -> torch.Tensor:
    return torch.cat([thinker(**sample, use_cache=False).logits[0] for sample in samples]).double()


@pytest.fixture(scope="module")
def exact(tiny: Path, samples: list[dict[str, Any]]) -> torch.Tensor:
    return logits(load_thinker(tiny), samples)


def relative_difference(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


def test_smoothing_has_a_smaller_error_than_plain_rounding(
    tiny: Path, smoothed: Path, plain: Path, samples: list[dict[str, Any]], exact: torch.Tensor
) -> None:
    with_smoothing, without = load_checkpoint(smoothed / ASCEND), load_checkpoint(plain)
    error = relative_difference(logits(with_quantized_layers(tiny, with_smoothing, integer_linear), samples), exact)
    plain_error = relative_difference(logits(with_quantized_layers(tiny, without, integer_linear), samples), exact)
    assert error < 0.03
    assert error < 0.5 * plain_error


def test_smoothing_keeps_the_float_function(
    tiny: Path, smoothed: Path, samples: list[dict[str, Any]], exact: torch.Tensor
) -> None:
    """Smoothing divides norms and biases and multiplies columns. With float activations, only weights are rounded."""
    weights_only = logits(with_quantized_layers(tiny, load_checkpoint(smoothed / ASCEND), dequantized_linear), samples)
    assert relative_difference(weights_only, exact) < 0.03


def test_emulation_equals_integer_arithmetic(tiny: Path, smoothed: Path, samples: list[dict[str, Any]]) -> None:
    """Every Linear, on the inputs that it has in the emulated model."""
    written = load_checkpoint(smoothed / ASCEND)
    emulated = with_quantized_layers(tiny, written, emulated_linear)
    compared: list[str] = []

    def compare(name: str) -> Callable[..., None]:
        integers = integer_linear(written, name)

        def hook(_module: Any, arguments: tuple[torch.Tensor], out: torch.Tensor) -> None:
            assert relative_difference(out, integers(arguments[0])) < 1e-6
            compared.append(name)

        return hook

    for number, layer in enumerate(decoder(emulated).layers):
        for name in linear_names():
            if name.startswith(prefix := f"thinker.model.layers.{number}."):
                layer.get_submodule(name.removeprefix(prefix)).register_forward_hook(compare(name))
    logits(emulated, samples)
    assert sorted(compared) == sorted(list(linear_names()) * len(samples))


def test_reported_layer_errors_match_the_written_layers(
    tiny: Path, smoothed: Path, index: Path, samples: list[dict[str, Any]]
) -> None:
    """A layer's error is measured on inputs that come from the float layers before it, of the probe samples only."""
    floating, integers = (
        load_thinker(tiny),
        with_quantized_layers(tiny, load_checkpoint(smoothed / ASCEND), integer_linear),
    )
    error, signal = [0.0] * LAYERS, [0.0] * LAYERS

    def compare(number: int) -> Callable[..., None]:
        def hook(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            others = {k: v for k, v in keywords.items() if k != "hidden_states"}
            changed = quantized[number](hidden, **others)
            expected, actual = (o[0] if isinstance(o, tuple) else o for o in (out, changed))
            error[number] += float((actual - expected).double().square().sum())
            signal[number] += float((expected - hidden).double().square().sum())

        return hook

    quantized = decoder(integers).layers
    for number, layer in enumerate(decoder(floating).layers):
        layer.register_forward_hook(compare(number), with_kwargs=True)
    roles = assign_roles([p.modality for p in prepared_samples(tiny, index, 200704)], "tokens")
    logits(floating, [samples[position] for position in roles.probe_samples])
    report = load_json(smoothed / ASCEND / "quant_report.json")
    for number, layer in enumerate(report["layers"]):
        assert layer["output_error"] == pytest.approx((error[number] / signal[number]) ** 0.5, rel=0.001)


# --- report --------------------------------------------------------------------------------------------------


def test_report_is_complete(tiny: Path, smoothed: Path, samples: list[dict[str, Any]]) -> None:
    report = load_json(smoothed / ASCEND / "quant_report.json")
    assert report == load_json(smoothed / COMPRESSED / "quant_report.json")
    assert [linear["name"] for layer in report["layers"] for linear in layer["linears"]] == linear_names()
    modalities = {"text", "image", "audio", "video"}
    for layer in report["layers"]:
        assert set(layer["output_error_by_modality"]) == modalities
        assert {entry["group"] for entry in layer["smoothing"]} == {"qkv", "o", "gate_up", "down"}
        assert all(entry["gain"] <= 1.0 and entry["reason"] for entry in layer["smoothing"])
        for linear in layer["linears"]:
            assert linear["scheme"] == "W8A8_DYNAMIC"
            assert 0 < linear["weight_error"] < 0.02 and 0 < linear["output_error"] < 0.05
            assert set(linear["output_error_by_modality"]) == modalities
    assert set(report["tokens_by_modality"]) == modalities and report["samples"] == 4
    assert sum(report["tokens_by_modality"].values()) == sum(s["input_ids"].shape[1] for s in samples)
    assert {"towers", "forward", "iter_smooth", "linear_quant", "propagate", "finish"} <= set(
        report["seconds_by_phase"]
    )
    assert 0 < sum(report["seconds_by_phase"].values()) <= report["seconds"]
    assert report["peak_rss_bytes"] > 100 << 20 and report["peak_device_bytes"] == 0
    assert report["device"] == "cpu" and report["seed"] == 0 and report["warnings"] == []
    assert report["recipe"] == "qwen2_5_omni_w8a8.yaml" and report["quant_type"] == "w8a8"
    assert set(report["versions"]) >= {"msmodelslim_omni", "torch", "transformers"}


def test_reported_sizes_match_the_files(tiny: Path, smoothed: Path) -> None:
    report = load_json(smoothed / ASCEND / "quant_report.json")
    for saver in (ASCEND, COMPRESSED):
        tensors = load_checkpoint(smoothed / saver)
        assert report["output_bytes"][saver] == sum(t.nbytes for t in tensors.values())
    source, ascend = load_checkpoint(tiny), load_checkpoint(smoothed / ASCEND)
    assert report["source_bytes"] == sum(t.nbytes for t in source.values())
    assert sum(part["bytes_before"] for part in report["parts"]) == report["source_bytes"]
    assert sum(part["bytes_after"] for part in report["parts"]) == report["output_bytes"][ASCEND]
    stored = sum(ascend[f"{n}.{s}"].nbytes for n in linear_names() for s in ("weight", "weight_scale", "weight_offset"))
    weights = sum(ascend[f"{n}.weight"].numel() for n in linear_names())
    assert report["bits_per_weight"] == pytest.approx(8 * stored / weights)


def test_markdown_report(smoothed: Path, plain: Path) -> None:
    page = (smoothed / COMPRESSED / "quant_report.md").read_text(encoding="utf-8")
    for expected in ("## Calibration data", "4 samples", "audio", "## Smoothing", "| 3 | down |", "peak memory"):
        assert expected in page
    page = (plain / "quant_report.md").read_text(encoding="utf-8")
    assert "data-free" in page and "## Smoothing" not in page


def test_report_of_a_data_free_run(plain: Path) -> None:
    report = load_json(plain / "quant_report.json")
    assert report["data_free"] is True and report["samples"] == 0 and report["tokens_by_modality"] == {}
    for layer in report["layers"]:
        assert layer["output_error"] is None and layer["smoothing"] == []
        assert all(linear["weight_error"] > 0 and linear["output_error"] is None for linear in layer["linears"])


# --- determinism, and other sources --------------------------------------------------------------------------


@pytest.mark.usefixtures("all_steps")
def test_two_runs_give_the_same_bytes(tiny: Path, smoothed: Path, index: Path, tmp_path: Path) -> None:
    formats = ("--save_format", ASCEND, "--save_format", COMPRESSED)
    quant(tiny, tmp_path / "again", "--dataset", index, *formats).done()
    assert files(tmp_path / "again") == files(smoothed)


def test_single_file_float32_source(tiny: Path, plain: Path, tmp_path: Path) -> None:
    """A float32 checkpoint in one file without an index. Scales and biases keep its dtype."""
    source = make_tiny_omni(tmp_path / "fp32", dtype="float32", shards=1, layers=1)
    assert not (source / "model.safetensors.index.json").exists()
    save = tmp_path / "out"
    index = write_index(tmp_path / "data", {"text": "Hello."}, {"audio": str(DATA / "audio/three_beeps.wav")})
    words = ("--save_format", COMPRESSED, "--dataset", index, "--config_path", fast_recipe(tmp_path))
    quant(source, save, *words).done()
    written, before = load_checkpoint(save), load_checkpoint(source)
    names = [n for n in linear_names() if ".layers.0." in n]
    assert {n.removesuffix(".weight") for n, t in written.items() if t.dtype == torch.int8} == set(names)
    assert all(written[f"{name}.weight_scale"].dtype == torch.float32 for name in names)
    float_biases = {n for n in before if n.removesuffix(".bias") in names and n.endswith(".bias")}
    assert float_biases and all(written[n].dtype == torch.float32 for n in float_biases)


def test_part_file_size_zero_is_one_file(tiny: Path, plain: Path, tmp_path: Path) -> None:
    recipe = change_recipe(tmp_path, "part_file_size: 4 ", "part_file_size: 0 ", MINMAX)
    quant(tiny, tmp_path / "out", "--config_path", recipe).done()
    assert [f.name for f in (tmp_path / "out").glob("*.safetensors")] == ["quant_model_weights.safetensors"]
    assert not list((tmp_path / "out").glob("*.index.json"))
    assert load_checkpoint(tmp_path / "out").keys() == load_checkpoint(plain).keys()


def test_recipe_of_msmodelslim_runs_unchanged(tiny: Path, plain: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "qwen2_5_omni_thinker_w8a8.yaml"
    recipe.write_text(MSMODELSLIM_RECIPE, encoding="utf-8")
    quant(tiny, tmp_path / "out", "--config_path", recipe, "--model_type", "Qwen2.5-Omni-7B").done()
    weights = "quant_model_weights.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (plain / weights).read_bytes()
    assert (tmp_path / "out" / recipe.name).read_text(encoding="utf-8") == MSMODELSLIM_RECIPE


MSMODELSLIM_RECIPE = (Path(__file__).parents[1] / "msmodelslim_recipe.yaml").read_text(encoding="utf-8")


def test_excluded_linears_stay_float(tiny: Path, tmp_path: Path) -> None:
    exclude = 'exclude: ["*audio_tower*", "*visual*", "*.layers.{0,2}.*"]'
    recipe = change_recipe(tmp_path, 'exclude: ["*audio_tower*", "*visual*"]', exclude, MINMAX)
    save = tmp_path / "out"
    formats = ("--save_format", ASCEND, "--save_format", COMPRESSED)
    quant(tiny, save, "--config_path", recipe, *formats).done()
    source, written = load_checkpoint(tiny), load_checkpoint(save / ASCEND)
    floats = [n for n in linear_names() if ".layers.0." in n or ".layers.2." in n]
    description = load_json(save / ASCEND / "quant_model_description.json")
    for name in floats:
        assert torch.equal(written[f"{name}.weight"], source[f"{name}.weight"])
        assert description[f"{name}.weight"] == "FLOAT" and f"{name}.weight_scale" not in written
    quantization = load_json(save / COMPRESSED / "config.json")["quantization_config"]
    ignore = [re.compile(pattern.removeprefix("re:")) for pattern in quantization["ignore"]]
    for name in linear_names():
        for spelling in (name, name.replace("thinker.model.", "thinker.model.language_model.")):
            assert any(pattern.match(spelling) for pattern in ignore) == (name in floats), spelling
    linears = [e for layer in load_json(save / ASCEND / "quant_report.json")["layers"] for e in layer["linears"]]
    assert [e["name"] for e in linears if e["scheme"] == "FLOAT"] == floats


# --- flags ---------------------------------------------------------------------------------------------------


def test_dry_run_lists_every_linear_and_writes_nothing(tiny: Path, index: Path, tmp_path: Path) -> None:
    save = tmp_path / "out"
    answer = quant(tiny, save, "--dataset", index, "--dry_run", "--json").done()
    assert [linear["name"] for linear in answer.json["linears"]] == linear_names()
    assert {linear["scheme"] for linear in answer.json["linears"]} == {"W8A8_DYNAMIC"}
    kept = {entry["part"]: entry["why"] for entry in answer.json["kept_float"]}
    assert {"lm_head", "visual tower", "audio tower", "talker", "token2wav", "embedding"} <= set(kept)
    assert all(kept.values())
    assert answer.json["samples"] == 4 and answer.json["model_type"] == "Qwen2.5-Omni-7B"
    for size in ("disk_bytes", "peak_memory_bytes"):
        assert answer.json[size] > 0
    shown = quant(tiny, save, "--dataset", index, "--dry-run", "--all").done().out
    for name in linear_names():
        assert name in shown
    assert "peak memory" in shown and "token2wav" in shown
    assert not save.exists()


def test_estimated_output_size(tiny: Path, plain: Path, tmp_path: Path) -> None:
    answer = quant(tiny, tmp_path / "out", "--config_path", MINMAX, "--dry_run", "--json").done()
    real = sum(f.stat().st_size for f in plain.iterdir())
    assert answer.json["output_bytes"][ASCEND] == pytest.approx(real, rel=0.02)


def test_stdout_is_json_only(tiny: Path, index: Path, tmp_path: Path) -> None:
    answer = quant(tiny, tmp_path / "out", "--dataset", index, "--max_samples", 1, "--json").done()
    written = load_json(tmp_path / "out" / "quant_report.json")
    assert answer.json.pop("seconds") > 0 and answer.json["layers"] == written["layers"]
    assert "model type Qwen2.5-Omni-7B, derived from config.json" in answer.err
    assert answer.err.startswith("device cpu (as requested)")


def test_max_samples_selects_by_seed(tiny: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path / "data", *({"text": f"Sentence {'very ' * n}long."} for n in range(12)))
    recipe, tokens = fast_recipe(tmp_path), {}
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = ("--dataset", index, "--max_samples", 3, "--seed", seed, "--json", "--config_path", recipe)
        report = quant(tiny, tmp_path / run, *words).done().json
        assert report["samples"] == 3 and report["seed"] == seed
        tokens[run] = report["tokens_by_modality"]["text"]
    assert tokens["a"] == tokens["b"] != tokens["c"]
    weights = "quant_model_weights.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()


@pytest.mark.parametrize("value", ["True", "False", "true"])
def test_trust_remote_code_accepts_msmodelslim_values(tiny: Path, tmp_path: Path, value: str) -> None:
    words = ("--config_path", MINMAX, "--trust_remote_code", value, "--dry_run")
    quant(tiny, tmp_path / "out", *words).done()


def test_hyphens_are_accepted(tiny: Path, tmp_path: Path) -> None:
    words = ("--model-path", tiny, "--save-path", tmp_path / "out", "--config-path", MINMAX, "--device", "cpu")
    command("quant", *words, "--trust-remote-code", "False", "--save-format", COMPRESSED, "--log-level", "error").done()
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "words",
    [
        ("--quant_type", "w8a8", "--config_path", MINMAX),
        ("--no_such_flag",),
        ("--max_samples", "0"),
        ("--max_samples", "many"),
        ("--trust_remote_code", "perhaps"),
        ("--log_level", "loud"),
    ],
)
def test_wrong_usage_exits_with_2(tiny: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    answer = quant(tiny, tmp_path / "out", *words)
    assert answer.code == 2 and answer.err and "Traceback" not in answer.err
    assert not (tmp_path / "out").exists()


def test_missing_flags_and_unknown_commands_exit_with_2() -> None:
    assert command("quant", "--model_path", "x").code == 2
    assert command("quantise").code == 2


def test_log_level_error_prints_nothing(tiny: Path, tmp_path: Path) -> None:
    assert quant(tiny, tmp_path / "out", "--config_path", MINMAX, "--log_level", "error").done().err == ""


def test_two_formats_get_separate_folders(smoothed: Path, plain: Path) -> None:
    report = load_json(smoothed / COMPRESSED / "quant_report.json")
    assert report["savers"] == {name: str(smoothed / name) for name in (ASCEND, COMPRESSED)}
    assert load_json(plain / "quant_report.json")["savers"] == {ASCEND: str(plain)}


# --- data-free without media libraries -----------------------------------------------------------------------

BLOCKED = """\
import sys

# None makes imports fail and find_spec report that there is no such module.
names = ("qwen_omni_utils", "av", "librosa", "soxr", "soundfile", "decord", "torchcodec")
sys.modules.update(dict.fromkeys(names))
from msmodelslim_omni.models import qwen2_5_omni

def refuse(*arguments):
    raise RuntimeError("a data-free run opened the towers or the media processor")

qwen2_5_omni.open_stem = qwen2_5_omni.open_media_processor = refuse
from msmodelslim_omni.cli import main
main()
"""


def test_data_free_run_needs_no_dataset_media_library_or_tower(tiny: Path, plain: Path, tmp_path: Path) -> None:
    """Runs in a separate process without media libraries, processor files and dataset."""
    source = Path(shutil.copytree(tiny, tmp_path / "source"))
    for name in ("preprocessor_config.json", "tokenizer.json", "chat_template.json"):
        (source / name).unlink()
    words = ["quant", "--model_path", source, "--save_path", tmp_path / "out", "--device", "cpu", "--json"]
    run = subprocess.run(
        [sys.executable, "-c", BLOCKED, *map(str, words), "--config_path", MINMAX, "--dataset", "nowhere"],
        capture_output=True,
        text=True,
        cwd=Path(omni.__file__).parents[2],
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["data_free"] is True and any("'nowhere' is not read" in w for w in report["warnings"])
    weights = "quant_model_weights.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (plain / weights).read_bytes()


# --- other commands ------------------------------------------------------------------------------------------


def test_inspect_shows_float_and_both_formats(tiny: Path, smoothed: Path) -> None:
    results = {}
    for folder in (tiny, smoothed / ASCEND, smoothed / COMPRESSED):
        results[folder] = command("inspect", folder, "--json").done().json
        assert results[folder]["bytes"] == sum(t.nbytes for t in load_checkpoint(folder).values())
    schemes = [entry["scheme"] for entry in results.values()]
    assert schemes == ["float", "ascend W8A8_DYNAMIC", "compressed-tensors int-quantized"]
    for folder, entry in results.items():
        parts = {part["name"]: part for part in entry["parts"]}
        assert {"decoder layers", "lm_head", "visual tower", "talker", "token2wav"} <= set(parts)
        assert ("I8" in parts["decoder layers"]["dtypes"]) == (folder != tiny)
        assert all(part["scheme"] == "float" for name, part in parts.items() if name != "decoder layers")
    parameters = {sum(part["parameters"] for part in entry["parts"]) for entry in results.values()}
    assert len(parameters) == 1
    assert "token2wav" in command("inspect", smoothed / ASCEND).done().out


def test_recipes_commands(tmp_path: Path) -> None:
    listed = command("recipes", "list", "--json").done().json
    kinds = {entry["name"]: entry["quant_type"] for entry in listed}
    assert {name: kinds[name] for name in ("qwen2_5_omni_w4a16", "qwen2_5_omni_w8a8", MINMAX)} == {
        "qwen2_5_omni_w4a16": "w4a16", "qwen2_5_omni_w8a8": "w8a8", MINMAX: "w8a8",
    }  # fmt: skip
    assert all(f"_{kind}" in name for name, kind in kinds.items())
    (path,) = (entry["path"] for entry in listed if entry["name"] == MINMAX)
    assert MINMAX in command("recipes", "list").done().out
    shown = command("recipes", "show", MINMAX).done().out
    assert shown == Path(path).read_text(encoding="utf-8")
    schema = command("recipes", "schema").done().json
    assert "spec" in schema["properties"] and "apiversion" in schema["required"]
    assert "valid" in command("recipes", "validate", "qwen2_5_omni_w8a8", MINMAX).done().out
    broken = tmp_path / "broken.yaml"
    broken.write_text(shown.replace("include:", "includes:"), encoding="utf-8")
    message = command("recipes", "validate", broken).fault()
    assert "broken.yaml:" in message and "includes" in message and "'include'" in message
    assert "Shipped recipes" in command("recipes", "show", "qwen_w8a8").fault()


def test_integer_linear_is_close_to_a_float_linear(tiny: Path) -> None:
    """Checks the reference that these tests use."""
    torch.manual_seed(0)
    weight, x = torch.randn(16, 32), torch.randn(5, 32)
    scale = weight.abs().amax(1, keepdim=True) / 127
    assert relative_difference(IntegerLinear((weight / scale).round(), scale, None)(x), F.linear(x, weight)) < 0.02
