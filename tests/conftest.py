"""Shared fixtures: tiny Qwen2.5-Omni, Qwen2.5-VL, Qwen3-VL and Qwen3-Omni models, made once per session."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

# Before torch is imported. Processes that tests start inherit both.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow a shared machine
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are too small for more; `make test-isa` sets it too

import pytest
from make_tiny_omni import make_tiny_omni
from make_tiny_qwen3_omni import make_tiny_qwen3_omni
from make_tiny_qwen3_vl import make_tiny_qwen3_vl
from make_tiny_vl import make_tiny_vl
from outputs import quantize_all
from refinement import ALL_STEPS, FEW_STEPS, steps

from msmodelslim_omni.commands.shell import quiet_libraries

quiet_libraries()


# The files that take longest. They run first, so that no process is left with one of them alone at the end.
LONGEST = (
    "test_team", "test_resume", "test_doctor", "test_end_to_end", "test_faults_cli", "test_trained", "test_analyze",
    "test_w4a16", "test_evaluate", "test_run_all",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="module", autouse=True)
def _freeze_objects() -> None:
    """Leave the objects of libraries and of earlier modules to no garbage collection: each takes as long as a layer."""
    gc.set_threshold(20_000)  # as the command does
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _hide_matplotlib(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hide matplotlib from tests that do not check figures, because figures take longer than the tiny runs."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in ("test_report_html", "test_model_card", "test_analysis_page"):
            patch.setitem(sys.modules, "matplotlib", None)  # makes the import fail
        yield


# Modules that check the quality of refined scales, or compare with runs in processes of their own.
REFINED = ("test_expected_error", "test_massive_tokens", "test_shared_norm", "test_smooth", "test_team")


@pytest.fixture(scope="session", autouse=True)
def _few_steps(pytestconfig: pytest.Config) -> Iterator[None]:
    """Refine scales in few steps where nothing depends on their quality; `full` tests refine in all steps."""
    with steps(FEW_STEPS if pytestconfig.option.markexpr == "not full" else ALL_STEPS):
        yield


@pytest.fixture(scope="module", autouse=True)
def _all_steps_in_module(request: pytest.FixtureRequest) -> Iterator[None]:
    with steps(ALL_STEPS) if request.module.__name__ in REFINED else nullcontext():
        yield


@pytest.fixture
def all_steps() -> Iterator[None]:
    with steps(ALL_STEPS):
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Omni in bfloat16: two shards, talker, token2wav, processor and spk_dict.pt. Tests must not change it."""
    return make_tiny_omni(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VL in bfloat16: two shards, and an untied lm_head as in the 7B. Tests must not change it."""
    return make_tiny_vl(tmp_path_factory.mktemp("models") / "tiny_vl")


@pytest.fixture(scope="session")
def tied_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VL in one file, with a tied lm_head that is not stored, as in the 3B. Tests must not change it."""
    return make_tiny_vl(tmp_path_factory.mktemp("models") / "tied_vl", tied=True, shards=1)


@pytest.fixture(scope="session")
def tiny_qwen3_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL in bfloat16: two shards, lm_head of its own, DeepStack in use. Tests must not change it."""
    return make_tiny_qwen3_vl(tmp_path_factory.mktemp("models") / "tiny_qwen3_vl")


@pytest.fixture(scope="session")
def tiny_qwen3_omni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-Omni in one file: three layers of 8 experts, talker and code2wav. Tests must not change it.

    The last DeepStack map is added after the last layer.
    """
    return make_tiny_qwen3_omni(tmp_path_factory.mktemp("models") / "qwen3_omni", shards=1)


@pytest.fixture(scope="session")
def qwen3_omni_outputs(tiny_qwen3_omni: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data-free outputs of it in every format; o_proj of one layer stays float. Tests must not change them."""
    folder = tmp_path_factory.mktemp("qwen3_omni") / "outputs"
    return quantize_all(tiny_qwen3_omni, folder, "layers.1.self_attn.o_proj")


@pytest.fixture
def tiny_copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Omni that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three cheap samples: text and an image from the shipped dataset, and a video with an audio track."""
    shipped = Path(__file__).parent.parent / "lab_calib" / "calibVideos"
    lines = [json.loads(line) for line in (shipped / "index.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = [next(e for e in lines if not e.keys() & {"image", "audio", "video", "messages"})]
    chosen.append(next(e for e in lines if "image" in e and not e.keys() & {"audio", "video", "messages"}))
    chosen.append({"video": "videos/cat_pan_zh.mp4", "text": "What is said?", "answer": "A cat."})
    for entry in chosen:
        for kind in ("image", "video"):
            if isinstance(entry.get(kind), str):
                entry[kind] = str(shipped / entry[kind])
    path = tmp_path / "data" / "index.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(json.dumps(entry, ensure_ascii=False) for entry in chosen), encoding="utf-8")
    return path
