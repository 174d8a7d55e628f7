"""doctor on outputs with experts: the right finding for every damage, and the loaders' rules on the real names."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from damage import Damage
from expert_damage import EXPERT_DAMAGES
from make_checkpoint import QWEN3_OMNI_SHAPES
from make_tiny_qwen3_omni import qwen3_omni_config, tiny_shape
from test_loader_rules import output_job

from msmodelslim_omni.doctor import examine
from msmodelslim_omni.doctor.codes import CODES
from msmodelslim_omni.doctor.linears import expected_linears
from msmodelslim_omni.doctor.names import ascend_modules, awq_loaders, compressed_tensors_loaders, loader_views
from msmodelslim_omni.formats import awq, compressed_tensors
from msmodelslim_omni.models import MODEL_TYPES


@pytest.mark.parametrize("damage", EXPERT_DAMAGES, ids=lambda damage: damage.name)
def test_every_damage_is_reported(
    damage: Damage, qwen3_omni_outputs: dict[str, Path], tiny_qwen3_omni: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(qwen3_omni_outputs[damage.of], tmp_path / "damaged"))
    damage.inflict(folder)
    diagnosis = examine(folder, tiny_qwen3_omni if damage.needs_source else None)
    found = [f"{f.code} | {f.where} | {f.what}" for f in diagnosis.findings if f.level != "ok"]
    assert [f for f in diagnosis.findings if f.code == damage.code and damage.where in f.where], found
    assert "check_failed" not in diagnosis.codes(), found


def test_damages_are_unique() -> None:
    assert len({damage.name for damage in EXPERT_DAMAGES}) == len(EXPERT_DAMAGES) > 30
    assert {damage.code for damage in EXPERT_DAMAGES} <= CODES.keys()


@pytest.mark.parametrize("published", [False, pytest.param(True, marks=pytest.mark.full)])
def test_loaders_convert_attention_and_experts_only(published: bool) -> None:
    """Every loader, among them vLLM-Omni, which builds talker and routers with the quantization config."""
    shape = QWEN3_OMNI_SHAPES["qwen3-omni"] if published else tiny_shape()
    spec = MODEL_TYPES["Qwen3-Omni-30B-A3B-Instruct"]
    config = qwen3_omni_config(shape, "bfloat16")
    shapes, _ = spec.family.expected_tensors(config)
    assert not published or len(shapes) == 28_010
    names = sorted(expected_linears(shapes))
    layers = range(spec.family.num_layers(config))
    planned = {spec.layer_name(i, linear) for i in layers for linear in spec.family.layer_spec(config).linears}
    assert not published or len(planned) == 18_624
    job = replace(output_job(sorted(planned), ()), ignore_patterns=spec.ignore_patterns)
    ignore = compressed_tensors.quantization_config(job)["ignore"]
    assert all(entry.startswith("re:.*") for entry in ignore)
    loaders = compressed_tensors_loaders(spec, ignore, ["Linear"])
    loaders += awq_loaders(spec, awq.modules_to_not_convert(job), planned)
    views = list(loader_views(loaders, names))
    assert [view.loader for view in views].count("vLLM-Omni") == 2 and len(views) == 6 + 8
    for view in views:
        assert view.converted == planned and not view.split, view.loader
    omni = next(view for view in views if view.loader == "vLLM-Omni")
    assert {n for n in names if n.startswith("talker.")} <= omni.known
    looked_up = {part for parts in ascend_modules(spec, names).values() for part in parts}
    floats = {n for n in names if n.startswith(("thinker.visual.", "thinker.lm_head"))}
    assert looked_up == planned | floats | {n for n in names if re.match(r"thinker.*\.mlp\.gate$", n)}
