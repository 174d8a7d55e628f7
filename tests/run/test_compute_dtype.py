"""`--compute_dtype`: the number format of the float model's forwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import change_recipe, command, fast_recipe, files, quant, stop_at, write_index

from msmodelslim_omni import QuantError, quantize


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ({"text": f"Sentence {'very ' * n}long."} for n in range(0, 240, 40))
    return write_index(tmp_path_factory.mktemp("data"), *texts)


def report_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "quant_report.json").read_text(encoding="utf-8"))
    return content


def test_bfloat16_changes_little_and_resumes_to_the_same_bytes(tiny: Path, index: Path, tmp_path: Path) -> None:
    options = {"config_path": str(fast_recipe(tmp_path)), "compute_dtype": "bfloat16"}
    exact = quantize(tiny, tmp_path / "exact", device="cpu", dataset=str(index), **{**options, "compute_dtype": "auto"})
    reduced = quantize(tiny, tmp_path / "reduced", device="cpu", dataset=str(index), **options)
    assert (exact.compute_dtype, exact.compute_dtype_reason) == ("float32", "the layers are small")
    assert (reduced.compute_dtype, reduced.compute_dtype_reason) == ("bfloat16", "as asked")
    for before, after in zip(exact.layers, reduced.layers, strict=True):
        assert after.output_error == pytest.approx(before.output_error, rel=0.1)
    assert files(tmp_path / "exact") != files(tmp_path / "reduced")
    stop_at("layers", 1, tiny, tmp_path / "stopped", index, **options)
    resumed = quantize(tiny, tmp_path / "stopped", device="cpu", dataset=str(index), **options)
    assert resumed.resumed_at_layer == 1
    assert files(tmp_path / "stopped") == files(tmp_path / "reduced")


def test_another_format_is_another_run(tiny: Path, index: Path, tmp_path: Path) -> None:
    recipe = str(fast_recipe(tmp_path))
    stop_at("layers", 1, tiny, tmp_path / "out", index, config_path=recipe, compute_dtype="bfloat16")
    with pytest.raises(QuantError, match="--compute_dtype was bfloat16, is float32"):
        quantize(tiny, tmp_path / "out", device="cpu", dataset=str(index), config_path=recipe, compute_dtype="float32")


def test_unknown_formats(tiny: Path, tmp_path: Path) -> None:
    result = quant(tiny, tmp_path / "out", "--compute_dtype", "fp16")
    assert result.code == 2 and all(word in result.err for word in ("'fp16'", "'auto'", "'float32'", "'bfloat16'"))
    recipe = change_recipe(tmp_path, "max_pixels: 200704 ", "compute_dtype: half\n    max_pixels: 200704 ")
    assert "compute_dtype" in command("recipes", "validate", recipe).fault()
