"""Open checkpoints: a single file, several shards, and folders that are not a complete checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.storage.checkpoint import (
    INDEX_NAME,
    MAX_JSON_BYTES,
    Checkpoint,
    load_json_object,
    open_checkpoint,
)
from msmodelslim_omni.storage.safetensors_io import write_tensors

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def tensor(number: int) -> torch.Tensor:
    return torch.full((3, 2), float(number))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint with tensors a and b in the first shard and c in the second."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "x"}')
    write_tensors(folder / FIRST, {"a": tensor(1), "b": tensor(2)})
    write_tensors(folder / SECOND, {"c": tensor(3)})
    write_index(folder, {"a": FIRST, "b": FIRST, "c": SECOND})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def fault(path: Path) -> QuantError:
    with pytest.raises(QuantError) as caught:
        open_checkpoint(path)
    return caught.value


# --- complete checkpoints ------------------------------------------------------------------------------------


def test_sharded(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.config == {"model_type": "x"}
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert [torch.equal(checkpoint.load(n), tensor(i)) for i, n in enumerate("abc", 1)] == [True] * 3
    assert checkpoint.load_rows("c", [2]).tolist() == [[3.0, 3.0]]
    assert [shard.name for shard in checkpoint.shards] == [FIRST, SECOND]
    assert checkpoint.total_bytes == 3 * 24


def test_single_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_tensors(tmp_path / "model.safetensors", {"a": tensor(1)})
    checkpoint = open_checkpoint(str(tmp_path))
    assert torch.equal(checkpoint.load("a"), tensor(1))
    assert [shard.name for shard in checkpoint.shards] == ["model.safetensors"]


def test_path_with_spaces_and_any_language(sharded: Path) -> None:
    moved = sharded.rename(sharded.with_name("我的 模型"))
    assert torch.equal(open_checkpoint(moved).load("c"), tensor(3))


# --- faults --------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    error = fault(tmp_path / "none")
    assert f"{str(tmp_path / 'none')!r} does not exist" in error.message
    assert "config.json" in error.hint


def test_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is not a checkpoint" in fault(tmp_path / "file").message


def test_no_config(sharded: Path) -> None:
    (sharded / "config.json").unlink()
    assert "has no config.json" in fault(sharded).message


def test_no_weights(sharded: Path) -> None:
    for file in sharded.glob("*safetensors*"):
        file.unlink()
    (sharded / "pytorch_model.bin").write_bytes(b"x")
    error = fault(sharded)
    assert "contains neither model.safetensors.index.json nor model.safetensors" in error.message
    assert ".bin" in error.hint


def test_missing_shard(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    error = fault(sharded)
    assert f"shard {SECOND!r} is missing" in error.message
    assert "fetch the checkpoint again" in error.hint


def test_truncated_shard(sharded: Path) -> None:
    (sharded / SECOND).write_bytes((sharded / SECOND).read_bytes()[:-4])
    assert SECOND in fault(sharded).message
    assert "not a valid safetensors file" in fault(sharded).message


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin", "", "./" + SECOND, "a\0b"],
)
def test_index_lists_only_shards_in_its_folder(sharded: Path, file: str) -> None:
    write_tensors(sharded.parent / "outside.safetensors", {"c": tensor(3)})
    write_index(sharded, {"a": FIRST, "b": FIRST, "c": file})
    error = fault(sharded)
    assert f"lists the file {file!r}, which is not a shard in the same folder" in error.message
    assert INDEX_NAME in error.message


def test_null_character_in_shard_name(sharded: Path) -> None:
    write_index(sharded, {"a": FIRST, "b": FIRST, "c": "a\0.safetensors"})
    assert "a\\x00.safetensors" in fault(sharded).message


@pytest.mark.parametrize("weight_map", [None, [], {"a": 5}, "x"])
def test_index_without_a_weight_map(sharded: Path, weight_map: Any) -> None:
    write_index(sharded, weight_map)
    assert "has no weight_map" in fault(sharded).message


def test_listed_tensor_missing_in_its_shard(sharded: Path) -> None:
    write_index(sharded, {"a": FIRST, "b": SECOND, "c": SECOND})
    assert f"tensor 'b' is not in {SECOND!r}" in fault(sharded).message


def test_unlisted_tensors(sharded: Path) -> None:
    write_index(sharded, {"a": FIRST, "c": SECOND})
    error = fault(sharded)
    assert "does not list 1 tensor(s) of the shards, for example 'b'" in error.message
    assert "different versions" in error.hint


@pytest.mark.parametrize("name", [INDEX_NAME, "config.json"])
@pytest.mark.parametrize("content", [b"{not json", b"\xff\xfe", b"", b"[" * 100_000, b"[1, 2]", b"null"])
def test_invalid_json_object_is_refused(sharded: Path, name: str, content: bytes) -> None:
    (sharded / name).write_bytes(content)
    error = fault(sharded)
    assert str(sharded / name) in error.message
    assert "JSON" in error.message
    assert error.hint == "fetch or copy the file again"


def test_oversized_json_is_not_read(sharded: Path) -> None:
    with (sharded / "config.json").open("r+b") as stream:
        stream.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(QuantError, match=rf"config\.json: .* the limit is {MAX_JSON_BYTES}"):
        load_json_object(sharded / "config.json")


def test_config_is_a_folder(sharded: Path) -> None:
    (sharded / "config.json").unlink()
    (sharded / "config.json").mkdir()
    assert "has no config.json" in fault(sharded).message


# --- other files ---------------------------------------------------------------------------------------------


def test_other_files_exclude_weights_and_hidden_files(sharded: Path) -> None:
    kept = ["spk_dict.pt", "tokenizer.json", "sub/template.jinja", "modeling.py", "README.md"]
    for name in [*kept, ".git/config", ".hidden", "sub/.cache", "extra.safetensors"]:
        (sharded / name).parent.mkdir(exist_ok=True)
        (sharded / name).write_bytes(b"x")
    assert {str(path) for path in open_checkpoint(sharded).other_files()} == {*kept, "config.json"}


# --- identity ------------------------------------------------------------------------------------------------


def change_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "y"}')


def change_value(folder: Path) -> None:
    write_tensors(folder / SECOND, {"c": tensor(4)})


def change_shape(folder: Path) -> None:
    write_tensors(folder / SECOND, {"c": tensor(3).view(2, 3)})


def move_tensor(folder: Path) -> None:
    write_tensors(folder / FIRST, {"a": tensor(1)})
    write_tensors(folder / SECOND, {"b": tensor(2), "c": tensor(3)})
    write_index(folder, {"a": FIRST, "b": SECOND, "c": SECOND})


@pytest.mark.parametrize("change", [change_config, change_value, change_shape, move_tensor])
def test_identity_changes_with_the_checkpoint(sharded: Path, change: Callable[[Path], None]) -> None:
    before = open_checkpoint(sharded).identity()
    assert open_checkpoint(sharded).identity() == before
    change(sharded)
    assert open_checkpoint(sharded).identity() != before


def test_identity_of_the_tiny_omni(tiny: Path, tiny_copy: Path) -> None:
    checkpoint: Checkpoint = open_checkpoint(tiny)
    assert "spk_dict.pt" in {str(path) for path in checkpoint.other_files()}
    assert len(checkpoint.identity()) == 64
    (tiny_copy / "spk_dict.pt").write_bytes(b"other")  # copied to the output, but not used in any computation
    copied = open_checkpoint(tiny_copy)
    before = copied.identity()
    (tiny_copy / "README.md").write_text("x")
    assert open_checkpoint(tiny_copy).identity() == before


def test_link_outside_the_checkpoint_is_refused(sharded: Path) -> None:
    secret = sharded.parent / "secret.txt"
    secret.write_text("x")
    (sharded / "NOTICE").symlink_to(secret)
    with pytest.raises(QuantError) as caught:
        open_checkpoint(sharded).other_files()
    assert "NOTICE" in caught.value.message and "links outside the checkpoint" in caught.value.message


def test_links_of_a_hub_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    """A hub cache has links snapshots/<revision>/file -> ../../blobs/<digest>."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    sharded.rename(snapshot)
    (blobs / "d1").write_text("a tokenizer")
    (snapshot / "tokenizer.json").symlink_to(Path("../../blobs/d1"))
    assert Path("tokenizer.json") in open_checkpoint(snapshot).other_files()
