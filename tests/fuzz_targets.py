"""Fuzz targets for test_fuzz.py and tests/fuzz/run.py: the readers of untrusted files, as functions of the bytes.

Each target writes the bytes to a file in its folder and reads the file with the package's function. For any bytes, the
reader must return, or raise a QuantError that names the file. Anything else is a bug.
"""

from __future__ import annotations

import json
import shutil
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from msmodelslim_omni.calibration.samples import MEDIA_KINDS, load_calib_set
from msmodelslim_omni.doctor.headers import check_files, check_index, read_folder
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.models import MODEL_TYPES, derive_model_type
from msmodelslim_omni.plan.admission import declared_scheme, refuse_quantized
from msmodelslim_omni.quantized.inspect import inspect_checkpoint
from msmodelslim_omni.quantized.reader import read_quantized
from msmodelslim_omni.recipe.loading import load_recipe
from msmodelslim_omni.run.manifest import sealed
from msmodelslim_omni.run.save_path import WORK_FOLDER
from msmodelslim_omni.run.workspace import Workspace
from msmodelslim_omni.storage.checkpoint import INDEX_NAME, load_json_object, open_checkpoint
from msmodelslim_omni.storage.safetensors_io import load_tensor, read_header, write_tensors

ROOT = Path(__file__).parent.parent
OMNI = MODEL_TYPES["Qwen2.5-Omni-7B"]
SHARD = "model-00001-of-00001.safetensors"
FINGERPRINT = {"seed": "0", "device": "cpu"}


def _read_or_refuse(read: Callable[[], Any], name: str) -> None:
    """Call `read`. The message of a QuantError must contain `name` and be printable on any terminal."""
    try:
        read()
    except QuantError as error:
        assert name in error.message, error.message[:300]
        assert len(error.message) < 400_000
        assert all(c == "\n" or c >= " " for c in error.message), error.message[:300]
        error.message.encode()


# --- files written by other programs -------------------------------------------------------------------------


def safetensors_file(folder: Path, content: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)

    def read() -> None:
        for info in read_header(path).values():
            assert info.nbytes <= len(content) and load_tensor(info).nbytes == info.nbytes

    _read_or_refuse(read, path.name)
    examined = read_folder(folder)  # the doctor's reader continues after errors
    list(check_files(examined))


def shard_index(folder: Path, content: bytes) -> None:
    if not (folder / SHARD).exists():
        (folder / "config.json").write_text('{"model_type": "qwen2_5_omni"}')
        write_tensors(folder / SHARD, {"a": torch.ones(2), "b": torch.ones(3)})
        write_tensors(folder.parent / "outside.safetensors", {"a": torch.ones(2)})
    (folder / INDEX_NAME).write_bytes(content)

    def read() -> None:
        checkpoint = open_checkpoint(folder)
        checkpoint.identity()
        for name, info in checkpoint.tensors.items():
            assert info.file.parent == folder
            checkpoint.load(name)

    _read_or_refuse(read, INDEX_NAME)
    examined = read_folder(folder)
    list(check_index(examined))


def recipe(folder: Path, content: bytes) -> None:
    path = folder / "my.yaml"
    path.write_bytes(content)

    def read() -> None:
        loaded = load_recipe(path)
        loaded.where(("spec", "process"))
        assert loaded.quant_type is not None and loaded.model_dump(mode="json")

    _read_or_refuse(read, path.name)


def sample_index(folder: Path, content: bytes) -> None:
    from PIL import Image

    if not (folder / "red.png").exists():
        Image.new("RGB", (32, 32)).save(folder / "red.png")
        with wave.open(str(folder / "tone.wav"), "wb") as sound:
            sound.setparams((1, 2, 16_000, 0, "NONE", ""))
            sound.writeframes(bytes(3200))
    path = folder / "index.jsonl"
    path.write_bytes(content)

    def read() -> None:
        for sample in load_calib_set(str(path), "Describe.", OMNI, max_samples=100).samples:
            assert all(file.is_file() for file in sample.files())
            kinds = {part["type"] for message in sample.messages for part in message["content"]}
            assert kinds <= {"text", *MEDIA_KINDS}

    _read_or_refuse(read, path.name)


# --- files written by this package ---------------------------------------------------------------------------


def config(folder: Path, content: bytes) -> None:
    """config.json, read by every function that reads it without building a model."""
    path = folder / "config.json"
    path.write_bytes(content)
    if not (folder / "model.safetensors").exists():
        write_tensors(folder / "model.safetensors", {"thinker.model.norm.weight": torch.ones(2)})

    def read() -> None:
        loaded = load_json_object(path)
        declared_scheme(folder, loaded)
        refuse_quantized(folder)
        family = derive_model_type(loaded).family
        family.layer_spec(loaded)
        assert family.num_layers(loaded) <= 1024
        inspect_checkpoint(folder)

    _read_or_refuse(read, "")
    _read_or_refuse(lambda: read_quantized(folder), "")


def manifest(folder: Path, content: bytes) -> None:
    """The manifest of the work folder, as given and with a valid digest. Files outside save_path must not change."""
    outside = folder.parent / "precious"
    outside.mkdir(exist_ok=True)
    (outside / "file").write_text("precious")
    try:
        with_digest = json.dumps(sealed(json.loads(content))).encode()
    except (ValueError, TypeError, RecursionError):
        with_digest = content
    for text in (content, with_digest):
        save = folder / "out"
        shutil.rmtree(save, ignore_errors=True)
        (save / WORK_FOLDER / "output" / "awq").mkdir(parents=True)
        (save / WORK_FOLDER / "manifest.json").write_bytes(text)

        def resume(save: Path = save) -> None:
            with Workspace(save, FINGERPRINT, overwrite=False) as workspace:
                workspace.manifest.checksums("layer 0")
                if workspace.manifest.committing:
                    workspace.commit(workspace.manifest.committing)

        _read_or_refuse(resume, WORK_FOLDER)
        assert (outside / "file").read_text() == "precious"
        assert [entry.name for entry in folder.iterdir()] == ["out"]


TARGETS: dict[str, Callable[[Path, bytes], None]] = {
    "safetensors": safetensors_file,
    "index": shard_index,
    "recipe": recipe,
    "samples": sample_index,
    "config": config,
    "manifest": manifest,
}


# --- valid files as seeds ------------------------------------------------------------------------------------


def _safetensors_seed() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [4, 8]},
    }
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(8)


def _config_seed() -> bytes:
    text = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100,
    }  # fmt: skip
    quantization = {"quant_method": "compressed-tensors", "bits": 4, "config_groups": {}, "ignore": []}
    outer = {"model_type": "qwen2_5_omni", "architectures": ["x"], "quantization_config": quantization}
    return json.dumps({**outer, "thinker_config": {"text_config": text, "model_type": "y"}}).encode()


def _manifest_seed() -> bytes:
    units = {"layer 0": {"checksums": {"awq": 1}, "record": {"index": 0}}}
    return json.dumps({"fingerprint": FINGERPRINT, "units": units, "replaced": [], "committing": ["awq"]}).encode()


SEEDS: dict[str, list[bytes]] = {
    "safetensors": [_safetensors_seed()],
    "index": [json.dumps({"metadata": {"total_size": 20}, "weight_map": {"a": SHARD, "b": SHARD}}).encode()],
    "recipe": [(ROOT / "configs" / f"qwen2_5_omni_{name}.yaml").read_bytes() for name in ("w8a8", "w4a16")],
    "samples": [
        b'{"text": "Hello", "answer": "Yes."}\n{"image": ["red.png"], "audio": "tone.wav", "text": "What?"}\n'
        b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "red.png"}]}]}\n'
    ],
    "config": [_config_seed()],
    "manifest": [_manifest_seed()],
}
