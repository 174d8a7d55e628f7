"""Runs the real command in this process; helpers for its input and output."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from msmodelslim_omni import quantize
from msmodelslim_omni.calibration.samples import load_calib_set, prepare_sample
from msmodelslim_omni.cli import app
from msmodelslim_omni.models import qwen2_5_omni as omni
from msmodelslim_omni.models.inputs import MediaLimits, ModelInputs
from msmodelslim_omni.runtime.progress import Progress

DATA = Path(__file__).parent.parent / "lab_calib" / "calibVideos"
MINMAX = "qwen2_5_omni_w8a8_minmax"
WORK = ".msmodelslim_work"


class CommandResult:
    """Exit code and output of a command. Exceptions other than a clean exit propagate to the test."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def fault(self) -> str:
        """Return the error message. Asserts exit code 1, one error, no traceback, and nothing on stdout."""
        assert self.code == 1, self.out + self.err
        assert "Traceback" not in self.err and self.out == ""  # `--json` prints the error on stdout too
        assert len(re.findall(r"^error: ", self.err, re.MULTILINE)) == 1
        return self.err[self.err.index("error: ") :]

    def done(self) -> CommandResult:
        """Assert exit code 0 and return self."""
        assert self.code == 0, self.out + self.err
        return self


def command(*words: object) -> CommandResult:
    """Run `msmodelslim` with these arguments."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    return CommandResult(result.exit_code, result.stdout, result.stderr)


def quant(model: Path, save: Path, *words: object) -> CommandResult:
    """Run `msmodelslim quant` on the CPU."""
    return command("quant", "--model_path", model, "--save_path", save, "--device", "cpu", *words)


def files(folder: Path) -> dict[str, bytes]:
    """Contents of all files below a folder, except the report, whose times differ between runs.

    Without the commands in model cards: an output of two formats, or one that was exported, was made by others.
    """
    contents = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    return {
        name: re.sub(rb"```\nmsmodelslim [^`]*```", b"", content) if name.endswith("README.md") else content
        for name, content in contents.items()
        if "quant_report" not in name
    }


def write_index(folder: Path, *entries: object) -> Path:
    """Write an index.jsonl with these entries; strings are written unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in entries)
    (folder / "index.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "index.jsonl"


def mixed_index(folder: Path) -> Path:
    """Write an index with text, an image, audio, and a video with audio: every modality, few tokens."""
    return write_index(
        folder,
        {"text": "Why is the sky blue?", "answer": "Short waves scatter most."},
        {"image": str(DATA / "images" / "notice_zh.png"), "text": "Read it."},
        {"audio": str(DATA / "audio" / "three_beeps.wav"), "text": "How many?"},
        {"video": str(DATA / "videos" / "cat_pan_zh.mp4"), "text": "What is said?", "answer": "A cat."},
    )


def change_recipe(folder: Path, old: str, new: str, name: str = "qwen2_5_omni_w8a8") -> Path:
    """Write a shipped recipe with one piece of its text replaced."""
    text = (Path(__file__).parent.parent / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    assert old in text
    path = folder / "changed.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def int4_recipe(
    folder: Path,
    *,
    method: str = "gptq",
    scale: bool = True,
    exclude: tuple[str, ...] = (),
    group_size: int = 128,
    **calibration: object,
) -> Path:
    """Write a W4A16 recipe for both layouts, with a coarse search, to be fast."""
    weight = {"scope": "per_group", "dtype": "int4", "symmetric": False, "method": method}
    qconfig = {"weight": {**weight, "ext": {"group_size": group_size}}}
    process: list[dict[str, object]] = [{"type": "awq", "n_grid": 4}] if scale else []
    process.append({"type": "linear_quant", "exclude": exclude, "qconfig": qconfig})
    savers = [{"type": "awq"}, {"type": "compressed_tensors"}]
    spec = {"process": process, "save": savers, "calibration": {"max_pixels": 12544, **calibration}}
    path = folder / "int4.yaml"
    path.write_text(json.dumps({"apiversion": "multimodal_vlm_modelslim_v1", "spec": spec}), encoding="utf-8")
    return path


class StopAt(Progress):
    """Simulates Ctrl-C at one step of a run."""

    def __init__(self, phase: str, done: int) -> None:
        self._at = (phase, done)

    def step(self, phase: str, done: int, total: int, detail: str = "") -> None:
        if (phase, done) == self._at:
            raise KeyboardInterrupt


def stop_at(phase: str, done: int, model: Path, save: Path, index: Path | None, **options: object) -> None:
    """Start a run and interrupt it at one step."""
    dataset = None if index is None else str(index)
    try:
        quantize(model, save, device="cpu", dataset=dataset, progress=StopAt(phase, done), **options)
    except KeyboardInterrupt:
        return
    raise AssertionError("the run was not stopped")


def fast_recipe(folder: Path) -> Path:
    """Write the default recipe with a fixed alpha and small images: the same steps without the slow parts."""
    path = change_recipe(folder, "alpha: auto ", "alpha: 0.5 ")
    text = path.read_text(encoding="utf-8")
    assert "max_pixels: 200704 " in text
    path.write_text(text.replace("max_pixels: 200704 ", "max_pixels: 12544 "), encoding="utf-8")
    return path


def thinker_inputs(model: Path, index: Path, max_pixels: int) -> list[dict[str, Any]]:
    """Return the samples of an index as keyword arguments of the thinker."""
    prepared = prepared_samples(model, index, max_pixels)
    return [{**p.tensors, "use_audio_in_video": p.use_audio_in_video} for p in prepared]


def prepared_samples(model: Path, index: Path, max_pixels: int) -> list[ModelInputs]:
    media = omni.open_media_processor(model, MediaLimits(8192, max_pixels, 2.0), False)
    calib_set = load_calib_set(str(index), "Describe.", omni.model_spec("Qwen2.5-Omni-7B"))
    return [prepare_sample(sample, media) for sample in calib_set.samples]
