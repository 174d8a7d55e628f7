"""Measure whole runs with many samples, a long sample, and a long clip, on a tiny Omni with random weights.

    PYTHONPATH=examples python benchmarks/many_and_long.py WORK [--threads 2] [--only texts,pictures,long,clip]
        [--counts 1000,10000] [--recipes w8a8,w4a16]

texts, pictures: as many texts, or small picture files, as --counts says. long: one text of 30,000 tokens. clip: one
video of 500 frames. Prints a Markdown table. Checkpoint and data are made in WORK.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tool_runs import ROOT, run_process

_WORDS = ("time", "way", "year", "work", "day", "part", "place", "case", "point", "group", "company", "number", "world")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="texts,pictures,long,clip")
    parser.add_argument("--counts", default="1000,10000")
    parser.add_argument("--recipes", default="w8a8,w4a16")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = checkpoint(arguments.work)
    print("| samples | recipe | tokens | s | s in layers, per sample | peak RSS, GiB |\n|---|---|--:|--:|--:|--:|")
    for name, index in datasets(arguments):
        for recipe in arguments.recipes.split(","):
            print(row(name, index, recipe, model, arguments), flush=True)


def checkpoint(work: Path) -> Path:
    path = work / "model"
    if not path.is_dir():
        make = "import sys; from make_tiny_omni import make_tiny_omni; make_tiny_omni(sys.argv[1], layers=2)"
        command = [sys.executable, "-c", make, str(path)]
        run_process(command, 2, work / "make.log", PYTHONPATH=str(ROOT / "examples"))
    return path


def datasets(arguments: argparse.Namespace) -> Iterable[tuple[str, Path]]:
    """Name and index of each dataset. A larger number of samples starts with the same samples."""
    work, kinds = arguments.work, arguments.only.split(",")
    counts = [int(count) for count in arguments.counts.split(",")]
    for count in counts if "texts" in kinds else ():
        yield f"{count:,} texts", write(work / f"texts-{count}", ({"text": words(16, i)} for i in range(count)))
    for count in counts if "pictures" in kinds else ():
        folder = work / f"pictures-{count}"
        yield f"{count:,} pictures", write(folder, pictures(folder, count))
    if "long" in kinds:
        yield "a text of 30,000 tokens", write(work / "long", [{"text": words(19_500, 0)}])
    if "clip" in kinds:
        folder = work / "clip"
        yield "a clip of 500 frames", write(folder, [{"video": str(clip(folder, 500)), "text": "What happens?"}])


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(_WORDS, k=count))


def write(folder: Path, samples: Iterable[dict[str, str]]) -> Path:
    folder.mkdir(exist_ok=True)
    index = folder / "index.jsonl"
    index.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return index


def pictures(folder: Path, count: int) -> Iterable[dict[str, str]]:
    """Distinct pictures of 56 x 56 pixels: four tokens each."""
    from PIL import Image

    (folder / "files").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / "files" / f"{number:05d}.png"
        Image.new("RGB", (56, 56), (number % 256, number // 256 % 256, 128)).save(path)
        yield {"image": str(path), "text": "Which colour?"}


def clip(folder: Path, frames: int) -> Path:
    """A grey clip of 1280 x 720 at two frames a second, as many as the recipe takes of a second."""
    import av
    import numpy as np

    folder.mkdir(exist_ok=True)
    path = folder / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2, width=1280, height=720, pix_fmt="yuv420p")
        for number in range(frames):
            picture = np.full((720, 1280, 3), 10 + number % 230, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    return path


def long_recipe(recipe: str, work: Path) -> Path:
    """The shipped recipe with pictures small enough for 500 frames, and room for the long text."""
    text = (ROOT / "configs" / f"qwen2_5_omni_{recipe}.yaml").read_text(encoding="utf-8")
    path = work / f"{recipe}.yaml"
    path.write_text(text.replace("max_pixels: 200704", "max_pixels: 25088\n    max_tokens: 33000"), encoding="utf-8")
    return path


def row(name: str, index: Path, recipe: str, model: Path, arguments: argparse.Namespace) -> str:
    out = arguments.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "msmodelslim_omni", "quant", str(model), str(out), "--device", "cpu"]
    command += ["--dataset", str(index), "--config_path", str(long_recipe(recipe, arguments.work))]
    seconds, peak = run_process(command, arguments.threads, arguments.work / "run.log", PYTHONPATH=str(ROOT))
    report: dict[str, Any] = json.loads((out / "quant_report.json").read_text(encoding="utf-8"))
    phases = report["seconds_by_phase"]
    samples = sum(1 for _ in index.open(encoding="utf-8"))
    in_layers = sum(phases.get(name, 0.0) for name in ("forward", "propagate")) / samples
    tokens = sum(report["tokens_by_modality"].values())
    return f"| {name} | {recipe} | {tokens:,} | {seconds:.0f} | {in_layers:.4f} | {peak / 2**30:.2f} |"


if __name__ == "__main__":
    main()
