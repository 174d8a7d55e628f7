"""The default format of W8A8 by device, and the lines at the end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import MINMAX, quant

from msmodelslim_omni.models import MODEL_TYPES
from msmodelslim_omni.recipe import find_recipe, resolve_recipe, shipped_recipes
from msmodelslim_omni.run.preparation import _default_formats
from msmodelslim_omni.run.request import QuantRequest
from msmodelslim_omni.runtime import Device, Progress


@pytest.mark.parametrize(
    ("device", "quant_type", "expected"),
    [
        ("cpu", "w8a8", ("compressed_tensors",)),
        ("cuda:0", "w8a8", ("compressed_tensors",)),
        ("npu:0", "w8a8", ()),  # the recipe's own, for vLLM-Ascend
        ("cpu", "w4a16", ()),
        ("cpu", "nf4", ()),
    ],
)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_default_format_is_that_of_the_device(
    model_type: str, device: str, quant_type: str, expected: tuple[str, ...]
) -> None:
    verified = {r.quant_type for r in shipped_recipes() if model_type in r.metadata.verified_model_types}
    if quant_type not in verified:
        pytest.skip(f"{model_type} has no recipe of this type")
    recipe = find_recipe(model_type, quant_type)
    request = QuantRequest(Path("model"), quant_type=quant_type)
    assert _default_formats(request, recipe, Device(device, "as requested"), Progress()) == expected


def test_a_named_recipe_keeps_its_format() -> None:
    request = QuantRequest(Path("model"), config_path="qwen2_5_omni_w8a8")
    assert _default_formats(request, resolve_recipe("qwen2_5_omni_w8a8"), Device("cpu", ""), Progress()) == ()


def test_dry_run_names_the_default_format(tiny: Path, tmp_path: Path) -> None:
    answer = quant(tiny, tmp_path / "out", "--quant_type", "w8a8", "--dry_run", "--json").done()
    assert list(answer.json["output_bytes"]) == ["compressed_tensors"]
    assert "--save_format ascendv1_saver" in answer.err


def test_last_lines_say_who_reads_the_output_and_what_comes_next(tiny: Path, tmp_path: Path) -> None:
    save = tmp_path / "out put"
    formats = ("--save_format", "ascendv1_saver", "--save_format", "compressed_tensors")
    lines = quant(tiny, save, "--config_path", MINMAX, *formats).done().out.splitlines()[-16:]
    ascend, compressed = lines[:7], lines[7:]
    assert ascend[0].endswith("is read by vLLM-Ascend (emulated)") and ascend[1].startswith("others: vLLM")
    assert ascend[2].startswith("serve in vLLM-Ascend (") and ascend[3].endswith("--quantization ascend")
    folder = f"'{save / 'compressed_tensors'}'"
    # The runtime of this run's device, a CPU, comes first, with what it needs.
    assert compressed[2].startswith("serve in vLLM 0.32.0, CPU build (right on a processor with VNNI only")
    assert f"api_server --model {folder} --dtype bfloat16" in compressed[3]
    assert compressed[4].startswith("serve in vLLM, NVIDIA cards (") and compressed[5] == f"  vllm serve {folder}"
    assert compressed[-2] == f"  msmodelslim eval {folder} --float {tiny} --dataset DATASET"
    assert compressed[-1] == f"  msmodelslim doctor {folder} --source {tiny}"
