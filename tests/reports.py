"""Synthetic reports with many layers and hostile names."""

from __future__ import annotations

from dataclasses import replace

from msmodelslim_omni.report.fidelity import (
    EvalReport,
    Fidelity,
    Interval,
    LayerDrift,
)
from msmodelslim_omni.report.report import (
    LayerRecord,
    LinearRecord,
    PartSize,
    Report,
)
from msmodelslim_omni.report.run_memory import RunMemory

MODALITIES = ("text", "image", "audio", "video")
LINEARS = tuple(f"self_attn.{n}_proj" for n in "qkvo") + tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))

# Markup, a template expression, math, a link, control characters, quotes, and a YAML header.
HOSTILE = "<script>alert(1)</script>{{ 7 * 7 }}$\\frac$[a](http://x.invalid)\x00\x1b\"'>\n---\nlicense: mit"


def made_report(layers: int = 3, name: str = "source") -> Report:
    """Return the report of a calibrated W4A16 run, with `name` in every field that can hold untrusted text."""

    def layer(index: int) -> LayerRecord:
        linears = tuple(
            LinearRecord(
                f"thinker.model.layers.{index}.{linear}", (64, 64), "W4A16_G64", 0.08, 0.01 * (1 + j + index % 5),
                {modality: 0.01 * (1 + k) for k, modality in enumerate(MODALITIES)},
            )
            for j, linear in enumerate(LINEARS)
        )  # fmt: skip
        scales = (
            {"group": "qkv", "alpha": 0.25, "gain": 0.5, "reason": name},
            {"group": "down", "alpha": None, "gain": 1.0, "reason": "the identity is best"},
        )
        errors = {modality: 0.02 * (1 + k) for k, modality in enumerate(MODALITIES)}
        is_fallback = index == 1
        notes = (f"fell back to plain rounding: {name}",) if is_fallback else ()
        return LayerRecord(index, linears, scales, 0.05, errors, 1.0 if is_fallback else 0.6, notes)

    return Report(
        model_type="Qwen2.5-Omni-3B",
        model_path=f"/models/{name}",
        quant_type="w4a16",
        recipe="recipe.yaml",
        savers={"awq": f"/out/{name}"},
        versions={"torch": "2.13.0"},
        device="cpu",
        seed=0,
        data_free=False,
        samples=43,
        tokens_by_modality=dict(zip(MODALITIES, (600, 100, 100, 200), strict=True)),
        parts=(
            PartSize("decoder layers", 7 * layers, 4 << 20, 1 << 20, "W4A16_G64"),
            PartSize(name, 1, 1 << 20, 1 << 20, "float, unchanged"),
        ),
        output_bytes={"awq": 2 << 20},
        source_bytes=5 << 20,
        bits_per_weight=4.25,
        layers=tuple(layer(index) for index in range(layers)),
        seconds=12.5,
        seconds_by_phase={"forward": 10.0, "write": 2.0},
        resumed_at_layer=0,
        peak_rss_bytes=3 << 30,
        peak_device_bytes=0,
        warnings=(f"a tensor is odd: {name}",),
        peak_rise_by_phase={"forward": 1 << 30, "write": 0},
        run_memory=RunMemory(4 << 30, 2 << 30, 5 << 30, 3 << 30, 36 << 20),
        dataset="calib" if name == "source" else name,
        dataset_digest="0123456789abcdef" * 4,
        max_samples=43,
        commands=(
            ("msmodelslim", "quant", "--model_path", name, "--config_path", "recipe.yaml", "--max_samples", "43"),
        ),
    )


def data_free(report: Report) -> Report:
    """Return the same report as of a data-free run."""
    layers = tuple(
        LayerRecord(
            layer.index,
            tuple(replace(lin, output_error=None, output_error_by_modality={}) for lin in layer.linears),
        )
        for layer in report.layers
    )
    return replace(report, data_free=True, samples=0, tokens_by_modality={}, layers=layers)


def made_evaluation(name: str = "data", layers: int = 3) -> EvalReport:
    """Return an evaluation report, with `name` in every field that can hold untrusted text."""

    def fidelity(loss: float) -> Fidelity:
        def around(value: float) -> Interval:
            return Interval(value, value * 0.9, value * 1.1)

        change = Interval(-0.02 * loss, -0.05 * loss, 0.01)
        exact = (around(0.8), around(0.8 - 0.02 * loss), change)
        agreement = (around(0.004 * loss), 0.09, around(0.9), around(0.85))
        return Fidelity(40, 900, *agreement, around(8.0), around(8.1), 30, *exact, 0.05, 0.998, 0.01, 0.9999)

    drift = tuple(LayerDrift(i, 0.01 * i, dict.fromkeys(MODALITIES, 0.01 * i)) for i in range(layers))
    return EvalReport(
        model_type="Qwen2.5-Omni-3B",
        float_path=f"/models/{name}",
        quant_path=f"/out/{name}",
        quant_format="awq",
        linears_by_scheme={"W4A16_G64": 7 * layers},
        dataset=f"/data/{name}/index.jsonl",
        scored="the answer and its end of 40 samples",
        samples=40,
        tokens_by_modality=dict(zip(MODALITIES, (600, 100, 100, 200), strict=True)),
        overall=fidelity(1.0),
        by_modality={modality: fidelity(1.0 + k) for k, modality in enumerate(MODALITIES)},
        layers=drift,
        float_bytes=5 << 20,
        quant_bytes=2 << 20,
        device="cpu",
        seed=0,
        versions={"torch": "2.13.0"},
        seconds=3.0,
        seconds_by_phase={"towers": 1.0, "layers": 2.0},
        peak_rss_bytes=1 << 30,
        peak_device_bytes=0,
        warnings=(f"few samples: {name}",),
    )
