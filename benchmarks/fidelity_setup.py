"""What the peers need to calibrate on the samples that this tool reads, and what they leave behind as a checkpoint.

    python benchmarks/fidelity_setup.py twin MODEL INDEX OUT [--length 256]
    python benchmarks/fidelity_setup.py assemble MODEL WEIGHTS OUT

twin: no peer takes images, audio and video for this model, but all take token ids. So every media token of the samples
gets a row of its own in an enlarged embedding, holding what the towers make of it, and a new id: a tool that reads
these ids feeds the decoder what this tool feeds it, but for the positions, which are those of a text. The samples are
joined and cut into blocks of equal length, as the peers do with their own data.

assemble: the float checkpoint in float32, its decoder layers replaced by those of a peer's result, unpacked by
awq_evaluate.py, which shares no code with the quantizer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from awq_evaluate import load_weights

EMBEDDING, LM_HEAD, LAYERS = "thinker.model.embed_tokens.weight", "thinker.lm_head.weight", "thinker.model.layers."
MAX_PIXELS = 200704  # this and the next as the shipped recipes have them
DEFAULT_TEXT = "What are the elements can you see and hear in these medias."


def media_rows(model: Path, index: Path) -> tuple[list[Tensor], Tensor]:
    """Token ids of every sample, media tokens renumbered from the vocabulary's end on, and their rows [n, hidden]."""
    from msmodelslim_omni.calibration.samples import load_calib_set, prepare_sample
    from msmodelslim_omni.models import derive_model_type
    from msmodelslim_omni.models.inputs import MediaLimits
    from msmodelslim_omni.runtime.budget import DEFAULT_BUDGET
    from msmodelslim_omni.storage.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model)
    spec = derive_model_type(checkpoint.config)
    family = spec.family
    processor = family.open_media_processor(model, MediaLimits(8192, MAX_PIXELS, 2.0), False)
    stem = family.open_stem(checkpoint, torch.device("cpu"), DEFAULT_BUDGET.towers)
    following = checkpoint.config["thinker_config"]["text_config"]["vocab_size"]
    samples, rows = [], []
    for sample in load_calib_set(str(index), DEFAULT_TEXT, spec).samples:
        inputs = prepare_sample(sample, processor)
        ids = inputs.tensors["input_ids"][0].clone()
        media = inputs.modality != 0
        rows.append(stem.layer_input(inputs).hidden[0, media].float())
        ids[media] = torch.arange(following, following + len(rows[-1]))
        following += len(rows[-1])
        samples.append(ids)
    return samples, torch.cat(rows)


def blocks(samples: list[Tensor], length: int) -> Tensor:
    """All samples one after the other in blocks [n, length]; what is left over is dropped."""
    joined = torch.cat(samples)
    return joined[: len(joined) // length * length].reshape(-1, length)


def copy_with(model: Path, out: Path, tensors: dict[str, Tensor], vocabulary: int | None = None) -> None:
    """The model's folder with these tensors in one file, of a larger vocabulary if that is said."""
    out.mkdir(parents=True)
    for file in model.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != "model.safetensors.index.json":
            shutil.copyfile(file, out / file.name)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype"] = config["thinker_config"]["torch_dtype"] = "float32"
    if vocabulary is not None:
        config["thinker_config"]["text_config"]["vocab_size"] = vocabulary
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def load_model(model: Path) -> dict[str, Tensor]:
    tensors = {name: value for file in sorted(model.glob("*.safetensors")) for name, value in load_file(file).items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def write_twin(model: Path, index: Path, out: Path, length: int) -> None:
    """OUT/model and OUT/tokens.safetensors."""
    samples, rows = media_rows(model, index)
    tensors = load_model(model)
    tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], rows])
    tensors[LM_HEAD] = torch.cat([tensors[LM_HEAD], torch.zeros(len(rows), tensors[LM_HEAD].shape[1])])
    tokens = blocks(samples, length)
    copy_with(model, out / "model", tensors, len(tensors[EMBEDDING]))
    save_file({"input_ids": tokens}, out / "tokens.safetensors")
    print(json.dumps({"tokens": tokens.numel(), "blocks": len(tokens), "media_tokens": len(rows)}))


def assemble(model: Path, weights: Path, out: Path) -> None:
    """The float model with a peer's decoder layers; refuses a result that lacks one or left one as it was."""
    tensors = load_model(model)
    result = load_weights(weights)
    for name in [name for name in tensors if name.startswith(LAYERS)]:
        found = result["layers." + name.removeprefix(LAYERS)]
        if name.endswith("_proj.weight") and torch.equal(found, tensors[name]):
            raise ValueError(f"{name} was not quantized")
        tensors[name] = found.contiguous()
    copy_with(model, out, tensors)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    twin, assembler = verbs.add_parser("twin"), verbs.add_parser("assemble")
    twin.add_argument("--length", type=int, default=256)
    for verb, middle in ((twin, "index"), (assembler, "weights")):
        verb.add_argument("model", type=Path)
        verb.add_argument(middle, type=Path)
        verb.add_argument("out", type=Path)
    args = parser.parse_args()
    with torch.no_grad():
        if args.verb == "twin":
            write_twin(args.model, args.index, args.out, args.length)
        else:
            assemble(args.model, args.weights, args.out)


if __name__ == "__main__":
    main()
