"""Run shipped recipes and the other commands with `--device` on a simulated card and on the CPU; print what differs.

PYTHONPATH=.:tests:examples python -m simulated_card.run_all FOLDER KIND [RECIPE ...]

Without recipes: all of them. One process for all, and a process of its own, because torch has queues for the gradients
of a card only if there was one when the process computed its first gradient. Prints one line for each run: its name,
`equal` or what differs. The models have two layers and the samples are short, which shortens the loops but leaves no
operation out. On the card, each recipe is stopped after the first layer and resumed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import yaml
from command import DATA, StopAt, command, files, write_index
from make_tiny_omni import make_tiny_omni
from make_tiny_qwen3_omni import make_tiny_qwen3_omni
from make_tiny_qwen3_vl import make_tiny_qwen3_vl
from make_tiny_vl import make_tiny_vl
from refinement import steps

from msmodelslim_omni import quantize
from simulated_card.card import Kind, simulated_card

ROOT = Path(__file__).parents[2]
MAKERS: dict[str, Any] = {
    "qwen3_omni": make_tiny_qwen3_omni,
    "qwen3_vl": make_tiny_qwen3_vl,
    "qwen2_5_vl": make_tiny_vl,
    "qwen2_5": make_tiny_omni,  # the recipe for texts alone too
}
MEASURED = ("device", "seconds", "seconds_by_phase", "peak_rss_bytes", "peak_device_bytes")  # not computed


def short(recipe: Path, folder: Path) -> Path:
    """A shipped recipe with the smallest picture and the coarsest grid."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if "max_pixels" in content["spec"].get("calibration", {}):
        content["spec"]["calibration"]["max_pixels"] = 4096  # the least that all models admit
    for step in content["spec"]["process"]:
        if step["type"] == "awq":
            step["n_grid"] = 1
    path = folder / recipe.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def differences(folder: Path, one: str, other: str) -> list[str]:
    """The names of files that differ, without the reports, which name the device and the times."""
    of_one, of_other = files(folder / one), files(folder / other)
    names = sorted(of_one.keys() | of_other.keys())
    return [name for name in names if not name.endswith("README.md") and of_one.get(name) != of_other.get(name)]


def runs(folder: Path, kind: Kind, recipes: list[str]) -> Iterator[tuple[str, list[str]]]:
    models: dict[str, Path] = {}
    texts = write_index(folder / "texts", *({"text": text, "answer": "Why not?"} for text in ("Why is it?", "Who, I?")))
    picture = {"image": str(DATA / "images" / "notice_zh.png"), "text": "Read it."}
    mixed = write_index(folder / "mixed", {"text": "Why is it so?", "answer": "Because."}, picture)
    for recipe in recipes:
        family = next(name for name in MAKERS if recipe.startswith(name))
        if family not in models:
            models[family] = MAKERS[family](folder / family, layers=2)
        path = short(ROOT / "configs" / f"{recipe}.yaml", folder / "recipes")
        needs_samples = "dataset" in path.read_text(encoding="utf-8")
        index = str(texts if recipe.endswith("_text") else mixed) if needs_samples else None
        for device in ("cpu", kind):
            save = folder / "out" / recipe / device
            with simulated_card(kind) if device == kind else nullcontext():
                if device == kind:
                    with suppress(KeyboardInterrupt):
                        quantize(
                            models[family], save, config_path=str(path), dataset=index, device=device,
                            progress=StopAt("layers", 1),
                        )  # fmt: skip
                    assert (save / ".msmodelslim_work").exists()
                quantize(models[family], save, config_path=str(path), dataset=index, device=device)
        yield recipe, differences(folder / "out" / recipe, "cpu", kind)
    if "qwen2_5_omni_w8a8" in recipes:
        yield from other_commands(folder, kind, models["qwen2_5"], texts)


def other_commands(folder: Path, kind: Kind, model: Path, index: Path) -> Iterator[tuple[str, list[str]]]:
    quantized = folder / "out" / "qwen2_5_omni_w8a8" / "cpu"
    small = ("--device", "{device}", "--max_samples", "2")
    words: dict[str, tuple[object, ...]] = {
        "generate": ("generate", quantized, "--text", "Hello", "--max_new_tokens", 2, "--device", "{device}"),
        "eval": ("eval", quantized, "--float", model, "--dataset", index, *small, "--json"),
        "analyze": ("analyze", model, "--dataset", index, *small, "--json"),
    }
    for name, given in words.items():
        outs: list[Any] = []
        for device in ("cpu", kind):
            filled = [str(word).replace("{device}", device) for word in given]
            with simulated_card(kind) if device == kind else nullcontext():
                outs.append(command(*filled).done())
        yield name, compared(name, outs)


def compared(name: str, outs: list[Any]) -> list[str]:
    """The texts of `generate`; of the others every number, but for times and memory."""
    if name == "generate":
        return [] if outs[0].out == outs[1].out else [outs[1].out]
    on_cpu, on_card = (out.json for out in outs)
    return [key for key in on_cpu if key not in MEASURED and on_cpu[key] != on_card[key]]


def main(folder: str, kind: Kind, *recipes: str) -> None:
    chosen = list(recipes) or sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    with simulated_card(kind):  # before the first gradient of the process
        import torch

        start = torch.ones(1, device=kind).requires_grad_()
        torch.autograd.grad(start.sum(), [start])
    with steps(3):
        for name, different in runs(Path(folder), kind, chosen):
            print(name, "differs: " + ", ".join(different) if different else "equal", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
