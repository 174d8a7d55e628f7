"""Time calibrated runs on many tokens beside one bare forward of the same tokens, and llm-compressor's SmoothQuant.

    python benchmarks/compare_speed.py run --environments DIR --work DIR --model MODEL --calibration INDEX
        [--samples 120] [--threads 2] [--tools forward,msmodelslim-w8a8,...]

MODEL is the real decoder of real_language.py (groups of 64), INDEX its calibration texts. The bare forward is that of
transformers' text model in float32, in blocks of 256 tokens, without loading. This tool's seconds are those of the
complete run, the peers' those of the quantizing call. Tools run one after another; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tool_runs import (
    HERE,
    ROOT,
    THIS_TOOL,
    TIMED_PEERS,
    Run,
    index_path,
    name_list,
    run_msmodelslim,
    run_once,
    run_peer,
    run_process,
)

FORWARD = "forward"
RECIPES = {
    f"{THIS_TOOL}-w8a8": ["--quant_type", "w8a8", "--save_format", "compressed_tensors"],
    f"{THIS_TOOL}-w4a16": ["--config_path", str(HERE / "recipes" / "w4a16_g64.yaml")],
}
TOOLS = [FORWARD, *RECIPES, *TIMED_PEERS]


def first_samples(index: Path, count: int, folder: Path) -> Path:
    """Copy the first lines of an index of texts."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = index.read_text(encoding="utf-8").splitlines()[:count]
    (folder / "index.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "index.jsonl"


def time_forward(model: Path, tokens: Path) -> None:
    """Print the tokens and the seconds of the second of two forwards of all blocks."""
    import torch
    from safetensors.torch import load_file

    from msmodelslim_omni.models.qwen2_5 import load_transformers

    omni = load_transformers().Qwen2_5OmniThinkerForConditionalGeneration
    thinker = omni.from_pretrained(model, torch_dtype=torch.float32).eval()
    blocks = load_file(tokens)["input_ids"]
    with torch.inference_mode():
        for counted in (False, True):
            start = time.perf_counter()
            for block in blocks if counted else blocks[:2]:
                thinker.model(input_ids=block[None], use_cache=False)
    print(json.dumps({"tokens": blocks.numel(), "seconds": time.perf_counter() - start}))


def run_forward(model: Path, tokens: Path, folder: Path, threads: int) -> Run:
    """Time the bare forward in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "forward", str(model), str(tokens)]
    seconds, peak = run_process(command, threads, folder / "log.txt", PYTHONPATH=str(ROOT))
    result = json.loads((folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1])
    return Run(FORWARD, "", result["seconds"], seconds, peak, "", f"{result['tokens']} tokens")


def run_tool(name: str, index: Path, twin: Path, work: Path, args: argparse.Namespace) -> Run:
    """Run one tool, or the bare forward."""
    model, tokens, folder = twin / "model", twin / "tokens.safetensors", work / "runs" / name
    if name == FORWARD:
        return run_forward(model, tokens, folder, args.threads)
    if name in RECIPES:
        return run_msmodelslim(name, RECIPES[name], args.model.resolve(), index, folder, args.threads)
    return run_peer(name, args.environments, model, tokens, folder, args.threads)


def run(args: argparse.Namespace) -> None:
    """Run the tools and print the table."""
    work = args.work.resolve()
    index = first_samples(args.calibration, args.samples, work / "text")
    twin = work / "twin"
    if not twin.is_dir():
        setup = [sys.executable, str(HERE / "fidelity_setup.py"), "twin", str(args.model), str(index), str(twin)]
        run_process(setup, args.threads, work / "twin.txt")
    rows = [run_once(work / "runs" / name, lambda n=name: run_tool(n, index, twin, work, args)) for name in args.tools]
    bare = next((row.seconds for row in rows if row.tool == FORWARD), float("nan"))
    print("| tool | version | s | of the bare forward | peak RSS, GiB | |\n| --- | --- | --: | --: | --: | --- |")
    for row in rows:
        memory = row.peak_rss_bytes / 2**30
        print(
            f"| {row.tool} | {row.version} | {row.seconds:.1f} | {row.seconds / bare:.2f} | {memory:.2f} | {row.note} |"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    runner = verbs.add_parser("run", help="run the tools and print the table")
    runner.add_argument("--environments", type=Path, required=True, help="folder of the peers' environments")
    runner.add_argument("--work", type=Path, required=True, help="folder for tokens, results and logs")
    runner.add_argument("--model", type=Path, required=True)
    runner.add_argument("--calibration", type=index_path, required=True, help="an index.jsonl of texts")
    runner.add_argument("--samples", type=int, default=120)
    runner.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of every tool")
    runner.add_argument("--tools", type=name_list(TOOLS), default=TOOLS, help=f"some of {','.join(TOOLS)}")
    forward = verbs.add_parser("forward", help="time the bare forward in this process")
    forward.add_argument("model", type=Path)
    forward.add_argument("tokens", type=Path)
    args = parser.parse_args()
    if args.verb == "forward":
        time_forward(args.model, args.tokens)
    else:
        run(args)


if __name__ == "__main__":
    main()
