"""Shared fixtures: a tiny Qwen2.5-Omni and tiny Qwen2.5-VL of the real classes, made once a session."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve a shared machine

import pytest
import torch
from make_tiny_omni import make_tiny_omni
from make_tiny_vl import make_tiny_vl

from msmodelslim_omni.commands.shell import quiet_libraries

quiet_libraries()
torch.set_num_threads(1)  # tensors here are tiny: a second thread only waits, the more so on a busy machine


@pytest.fixture(scope="module", autouse=True)
def _extra(request: pytest.FixtureRequest) -> Iterator[None]:
    """The extra `report` is there only for modules that look at what it makes: figures take longer than tiny runs."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in ("test_report_html", "test_model_card"):
            patch.setitem(sys.modules, "matplotlib", None)  # as the import system marks what is not there
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Omni in bfloat16, two shards, with talker, token2wav, processor and spk_dict.pt. Never change it."""
    return make_tiny_omni(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VL in bfloat16, two shards, with an lm_head of its own as the 7B. Never change it."""
    return make_tiny_vl(tmp_path_factory.mktemp("models") / "tiny_vl")


@pytest.fixture(scope="session")
def tied_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in one file, with an lm_head that is the embedding as the 3B's, and not in the file. Never change it."""
    return make_tiny_vl(tmp_path_factory.mktemp("models") / "tied_vl", tied=True, shards=1)


@pytest.fixture
def tiny_copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three samples from the shipped set: text, an image, a video with sound; cheap enough for every test."""
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
