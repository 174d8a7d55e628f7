"""Let peers calibrate on the samples that this tool reads, and turn their results into checkpoints.

    python benchmarks/fidelity_setup.py twin MODEL INDEX OUT [--length 256]
    python benchmarks/fidelity_setup.py assemble MODEL WEIGHTS OUT

twin: no peer takes images, audio and video for this model, but all take token ids. Therefore every media token of the
samples gets a new id and its own row in an enlarged embedding; the row holds the towers' output for that token. A tool
that reads these ids feeds the decoder the same inputs as this tool, except for the positions, which are those of text.
The samples are joined and cut into blocks of equal length, as the peers do with their own data.

assemble: writes the float checkpoint in float32 with the decoder layers of a peer's result. awq_evaluate.py unpacks the
result; it shares no code with the quantizer.
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
MAX_PIXELS = 200704  # this and DEFAULT_TEXT are the values of the shipped recipes
DEFAULT_TEXT = "What are the elements can you see and hear in these medias."


def media_rows(model: Path, index: Path) -> tuple[list[Tensor], Tensor]:
    """Token ids of every sample, media tokens numbered from the end of the vocabulary, and their rows [n, hidden]."""
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
    next_id = checkpoint.config["thinker_config"]["text_config"]["vocab_size"]
    samples, rows = [], []
    for sample in load_calib_set(str(index), DEFAULT_TEXT, spec).samples:
        inputs = prepare_sample(sample, processor)
        ids = inputs.tensors["input_ids"][0].clone()
        media = inputs.modality != 0
        rows.append(stem.layer_input(inputs).hidden[0, media].float())
        ids[media] = torch.arange(next_id, next_id + len(rows[-1]))
        next_id += len(rows[-1])
        samples.append(ids)
    return samples, torch.cat(rows)


def cut_into_blocks(samples: list[Tensor], length: int) -> Tensor:
    """Join all samples and cut them into blocks [n, length]; the remainder is dropped."""
    joined = torch.cat(samples)
    return joined[: len(joined) // length * length].reshape(-1, length)


def copy_with(model: Path, out: Path, tensors: dict[str, Tensor], vocabulary: int | None = None) -> None:
    """Copy the model's folder with these tensors in one file, in float32; vocabulary: the new size, if it changes."""
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
    """Write OUT/model and OUT/tokens.safetensors."""
    samples, rows = media_rows(model, index)
    tensors = load_model(model)
    tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], rows])
    tensors[LM_HEAD] = torch.cat([tensors[LM_HEAD], torch.zeros(len(rows), tensors[LM_HEAD].shape[1])])
    tokens = cut_into_blocks(samples, length)
    copy_with(model, out / "model", tensors, len(tensors[EMBEDDING]))
    save_file({"input_ids": tokens}, out / "tokens.safetensors")
    print(json.dumps({"tokens": tokens.numel(), "blocks": len(tokens), "media_tokens": len(rows)}))


def assemble(model: Path, weights: Path, out: Path) -> None:
    """Write the float model with a peer's decoder layers.

    Raises KeyError if the result lacks a tensor, ValueError if it left a Linear unchanged.
    """
    tensors = load_model(model)
    result = load_weights(weights)
    for name in [name for name in tensors if name.startswith(LAYERS)]:
        weight = result["layers." + name.removeprefix(LAYERS)]
        if name.endswith("_proj.weight") and torch.equal(weight, tensors[name]):
            raise ValueError(f"{weights}: {name} was not quantized")
        tensors[name] = weight.contiguous()
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
