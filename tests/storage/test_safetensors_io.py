"""The reader and the writers, compared with the safetensors library, and with invalid files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.storage.direct_io import DirectFile
from msmodelslim_omni.storage.safetensors_io import (
    DTYPE_NAMES,
    MAX_HEADER_BYTES,
    TORCH_DTYPES,
    RandomAccessShard,
    SafetensorsWriter,
    TensorSpec,
    byte_view,
    load_finite,
    load_rows,
    load_tensor,
    read_bytes,
    read_header,
    write_tensors,
)

Header = dict[str, Any]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def every_kind() -> dict[str, torch.Tensor]:
    """Each dtype as a matrix, as a scalar, and as two kinds of empty tensor."""
    tensors = {}
    for number, (name, dtype) in enumerate(TORCH_DTYPES.items()):
        tensors[f"{name}.matrix"] = random_tensor(dtype, (3, 5), number)
        tensors[f"{name}.scalar"] = random_tensor(dtype, (), number)
        tensors[f"{name}.empty"] = torch.empty((0,), dtype=dtype)
        tensors[f"{name}.empty_dimension"] = torch.empty((2, 0, 3), dtype=dtype)
    return tensors


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert raw_bytes(actual) == raw_bytes(expected)


# --- against the library, in both directions -----------------------------------------------------------------


def test_library_reads_our_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, every_kind(), {"format": "pt"})
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == every_kind().keys()
    for name, tensor in every_kind().items():
        assert_same(loaded[name], tensor)
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(every_kind(), path, {"format": "pt"})
    infos = read_header(path)
    assert infos.keys() == every_kind().keys()
    for name, tensor in every_kind().items():
        assert (infos[name].shape, infos[name].nbytes) == (tuple(tensor.shape), tensor.nbytes)
        assert_same(load_tensor(infos[name]), tensor)


def test_bytes_equal_those_of_the_library(tmp_path: Path) -> None:
    tensors = {"a": random_tensor(torch.float32, (4, 3)), "b": random_tensor(torch.int8, (5,))}
    write_tensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == safetensors.torch.save(tensors)


def test_written_file_equals_expected_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"b": torch.tensor([1, -1], dtype=torch.int8), "a": torch.tensor([2.0])})
    header = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"I8","shape":[2],"data_offsets":[4,6]}}'
    )
    header += b" " * (-len(header) % 8)
    assert path.read_bytes() == len(header).to_bytes(8, "little") + header + b"\0\0\0\x40" + b"\x01\xff"


def test_names_in_any_language(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"层.权重": torch.ones(2)})
    assert safetensors.torch.load_file(path)["层.权重"].tolist() == [1, 1]
    assert list(read_header(path)) == ["层.权重"]


def test_dtype_names_are_a_bijection() -> None:
    assert {DTYPE_NAMES[dtype] for dtype in TORCH_DTYPES.values()} == set(TORCH_DTYPES)


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 4), max_size=3), max_size=5))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_names_and_shapes_round_trip(tmp_path: Path, shapes: dict[str, list[int]]) -> None:
    shapes = {n: s for n, s in shapes.items() if n != "__metadata__" and n.isprintable()}
    tensors = {name: random_tensor(torch.bfloat16, tuple(shape)) for name, shape in shapes.items()}
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors)
    infos = read_header(path)
    assert infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(load_tensor(infos[name]), tensor)


# --- reading parts -------------------------------------------------------------------------------------------


def test_load_rows(tmp_path: Path) -> None:
    tensor = random_tensor(torch.bfloat16, (7, 2, 3))
    write_tensors(tmp_path / "x", {"before": torch.ones(3), "t": tensor})
    info = read_header(tmp_path / "x")["t"]
    assert_same(load_rows(info, [5, 0, 5]), tensor[[5, 0, 5]])
    assert_same(load_rows(info, []), tensor[:0])


def test_read_bytes_from_the_middle(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"t": torch.arange(100, dtype=torch.uint8)})
    buffer = bytearray(5)
    read_bytes(read_header(tmp_path / "x")["t"], 40, memoryview(buffer))
    assert list(buffer) == [40, 41, 42, 43, 44]


def test_file_truncated_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"t": torch.ones(1000)})
    info = read_header(path)["t"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(QuantError, match=r"x\.safetensors.*ends within tensor 't'"):
        load_tensor(info)


def test_file_deleted_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"t": torch.ones(10)})
    info = read_header(path)["t"]
    path.unlink()
    with pytest.raises(QuantError, match=r"x\.safetensors: reading tensor 't' failed: No such file"):
        load_tensor(info)
    with pytest.raises(QuantError, match="cannot be read: No such file"):
        read_header(path)


# --- invalid files -------------------------------------------------------------------------------------------


def file_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data


def entry(begin: Any, end: Any, shape: Any = (4,), dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"a": entry(0, 4), "b": entry(4, 8)}
EIGHT = bytes(range(8))

INVALID: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "claims 0 bytes, the file has 0"),
    "seven bytes": (b"1234567", "claims"),
    "header beyond the file": (file_bytes(GOOD, EIGHT, length=500), "claims 500 bytes"),
    "huge header": (file_bytes(GOOD, EIGHT, length=2**63), "claims 9223372036854775808 bytes"),
    "not JSON": (file_bytes(b"{not json"), "header is not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "header is not valid JSON"),
    "nested too deeply": (file_bytes(b"[" * 100_000), "header is not valid JSON"),
    "not an object": (file_bytes([1, 2]), "not a JSON object"),
    "entry is a number": (file_bytes({"a": 5}), "'a' has no dtype, shape and data_offsets"),
    "entry is null": (file_bytes({"a": None}), "'a' has no dtype"),
    "no shape": (file_bytes({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, EIGHT), "'a' has no dtype, shape"),
    "one offset": (file_bytes({"a": {**entry(0, 4), "data_offsets": [0]}}, EIGHT), "'a' has no dtype"),
    "shape is a number": (file_bytes({"a": entry(0, 4, 4)}, EIGHT[:4]), "'a' has no dtype"),
    "unknown dtype": (file_bytes({"a": entry(0, 4, dtype="F4")}, EIGHT[:4]), "'a' has the unsupported dtype 'F4'"),
    "dtype is a list": (file_bytes({"a": entry(0, 4, dtype=["U8"])}, EIGHT[:4]), "'a' has no dtype"),
    "negative size": (file_bytes({"a": entry(0, 4, (-4,))}, EIGHT[:4]), "'a' has an invalid shape"),
    "negative offset": (file_bytes({"a": entry(-4, 0)}, EIGHT[:4]), "'a' has an invalid shape"),
    "fractions": (file_bytes({"a": entry(0, 4, (4.0,))}, EIGHT[:4]), "'a' has an invalid shape"),
    "true for one": (file_bytes({"a": entry(0, 1, (True,))}, b"1"), "'a' has an invalid shape"),
    "text for a number": (file_bytes({"a": entry(0, "4")}, EIGHT[:4]), "'a' has an invalid shape"),
    "too many dimensions": (file_bytes({"a": entry(0, 1, [1] * 40)}, b"1"), "'a' has an invalid shape"),
    "enormous shape": (file_bytes({"a": entry(0, 4, (2**60,))}, EIGHT[:4]), "'a' has an invalid shape"),
    "product overflows": (file_bytes({"a": entry(0, 4, [2**40] * 8)}, EIGHT[:4]), "span 4"),
    "too short for its shape": (
        file_bytes({"a": entry(0, 4, (8,))}, EIGHT[:4]),
        "needs 8 bytes, its data_offsets span 4",
    ),
    "end before begin": (file_bytes({"a": entry(4, 0)}, EIGHT[:4]), "span -4"),
    "overlap": (file_bytes({"a": entry(0, 4), "b": entry(2, 6)}, EIGHT[:6]), "'b' overlaps another tensor"),
    "gap": (file_bytes({"a": entry(0, 4), "b": entry(6, 10)}, bytes(10)), "leaves a gap"),
    "gap at the start": (file_bytes({"a": entry(4, 8)}, EIGHT), "leaves a gap"),
    "beyond the file": (file_bytes(GOOD, EIGHT[:7]), "the file at byte"),
    "bytes left over": (file_bytes(GOOD, EIGHT + b"?"), "the file at byte"),
}


@pytest.mark.parametrize("fault", INVALID)
def test_invalid_file_is_refused_with_its_name(tmp_path: Path, fault: str) -> None:
    content, why = INVALID[fault]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(QuantError) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    assert why in caught.value.message
    if "dtype '" not in caught.value.message:
        assert caught.value.hint == "fetch or copy the file again"


def test_good_file_behind_the_invalid_ones_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(file_bytes(GOOD, EIGHT))
    assert load_tensor(read_header(path)["b"]).tolist() == [4, 5, 6, 7]


def test_header_limit_is_checked_before_reading(tmp_path: Path) -> None:
    """A sparse file of 32 MiB that claims a header above the limit is refused before the header is read."""
    path = tmp_path / "x"
    with path.open("wb") as stream:
        stream.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(2 * MAX_HEADER_BYTES)
    with pytest.raises(QuantError, match=r"claims 16777217 bytes"):
        read_header(path)


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="cannot be read: Is a directory"):
        read_header(tmp_path)


def check_loads_or_raises_quant_error(path: Path, content: bytes) -> None:
    """Any content must either raise QuantError or give tensors that can all be loaded."""
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except QuantError:
        return
    for info in tensors.values():
        assert load_tensor(info).nbytes == info.nbytes


FUZZ = settings(
    max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@given(st.binary(max_size=200))
@FUZZ
def test_fuzz_random_bytes(tmp_path: Path, content: bytes) -> None:
    check_loads_or_raises_quant_error(tmp_path / "x", content)
    check_loads_or_raises_quant_error(tmp_path / "x", len(content).to_bytes(8, "little") + content)


@given(JSON_VALUES)
@FUZZ
def test_fuzz_any_json_as_header(tmp_path: Path, header: Any) -> None:
    check_loads_or_raises_quant_error(tmp_path / "x", file_bytes(header, EIGHT))


@given(
    st.sampled_from(["a", "b", "__metadata__"]),
    st.sampled_from(["dtype", "shape", "data_offsets"]),
    JSON_VALUES,
)
@FUZZ
def test_fuzz_one_value_of_a_valid_header(tmp_path: Path, name: str, key: str, value: Any) -> None:
    header: Header = json.loads(json.dumps(GOOD))
    header.setdefault(name, {})[key] = value
    check_loads_or_raises_quant_error(tmp_path / "x", file_bytes(header, EIGHT))


@given(st.integers(0, 200), st.integers(0, 255))
@FUZZ
def test_fuzz_one_byte_of_a_valid_file(tmp_path: Path, position: int, value: int) -> None:
    content = bytearray(file_bytes(GOOD, EIGHT))
    content[position % len(content)] = value
    check_loads_or_raises_quant_error(tmp_path / "x", bytes(content))


@pytest.mark.parametrize("kept", range(0, 130, 3))
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    complete = file_bytes(GOOD, EIGHT)
    assert kept < len(complete)
    (tmp_path / "x").write_bytes(complete[:kept])
    with pytest.raises(QuantError):
        read_header(tmp_path / "x")


# --- the writer ----------------------------------------------------------------------------------------------

SPECS = [TensorSpec("small", "I8", (3,)), TensorSpec("large", "F32", (2,))]


def test_writer_aligns_tensors_by_item_size(tmp_path: Path) -> None:
    specs = [TensorSpec(n, d, (3,)) for n, d in (("z", "I8"), ("y", "F64"), ("x", "BF16"), ("w", "F32"))]
    writer = SafetensorsWriter(tmp_path / "x", specs)
    assert [spec.name for spec in writer.specs] == ["y", "w", "x", "z"]
    for spec in writer.specs:
        writer.write(spec.name, torch.zeros(3, dtype=TORCH_DTYPES[spec.dtype]))
    writer.close()
    for info in read_header(tmp_path / "x").values():
        assert info.start % TORCH_DTYPES[info.dtype].itemsize == 0


def test_writer_accepts_chunks_of_bytes(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x", [TensorSpec("t", "U8", (6,))]) as writer:
        writer.write("t", iter([memoryview(b"abc"), memoryview(b"de"), memoryview(b"f")]))
    assert bytes(load_tensor(read_header(tmp_path / "x")["t"]).tolist()) == b"abcdef"


def test_writer_accepts_views(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    write_tensors(tmp_path / "x", {"t": tensor})
    assert_same(load_tensor(read_header(tmp_path / "x")["t"]), tensor)


def wrong_order(writer: SafetensorsWriter) -> None:
    writer.write("small", torch.zeros(3, dtype=torch.int8))


def wrong_size(writer: SafetensorsWriter) -> None:
    writer.write("large", torch.zeros(3))


def too_few(writer: SafetensorsWriter) -> None:
    writer.write("large", torch.zeros(2))


def interrupted(writer: SafetensorsWriter) -> None:
    writer.write("large", torch.zeros(2))
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("fault", "kind", "why"),
    [
        (wrong_order, ValueError, "expected tensor large, got small"),
        (wrong_size, ValueError, "expected 8 bytes for tensor large, got 12"),
        (too_few, ValueError, "tensor small was not written"),
        (interrupted, KeyboardInterrupt, ""),
    ],
)
def test_failed_write_keeps_the_old_file(
    tmp_path: Path, fault: Callable[[SafetensorsWriter], None], kind: type[BaseException], why: str
) -> None:
    (tmp_path / "x").write_bytes(b"old content")
    with pytest.raises(kind, match=why), SafetensorsWriter(tmp_path / "x", SPECS) as writer:
        fault(writer)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old content"


def test_file_appears_only_when_complete(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x", SPECS) as writer:
        writer.write("large", torch.zeros(2))
        assert not (tmp_path / "x").exists()
        writer.write("small", torch.zeros(3, dtype=torch.int8))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def cached(path: Path) -> bool:
    """Whether the second megabyte of a file is in the page cache. The check itself can load it, so call this once."""
    with path.open("rb", buffering=0) as stream:
        try:
            return os.preadv(stream.fileno(), [bytearray(1 << 20)], 1 << 20, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux shows what is cached")
def test_synced_data_leaves_the_page_cache(tmp_path: Path) -> None:
    tensor = random_tensor(torch.float32, (4 << 20,))
    (tmp_path / "plain").write_bytes(raw_bytes(tensor))
    with (tmp_path / "plain").open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(tmp_path / "plain"):
        pytest.skip("this file system is in memory")
    shard = RandomAccessShard(tmp_path / "x", [TensorSpec("a", "F32", (4 << 20,))])
    shard.put("a", tensor)
    shard.sync()
    assert not cached(tmp_path / "x.partial")
    shard.close()
    assert_same(load_tensor(read_header(tmp_path / "x")["a"]), tensor)


@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 100_001])
@pytest.mark.parametrize("size", [(1 << 20) - 1, 1 << 20, (1 << 20) + 4097, (17 << 20) + 5])
@pytest.mark.parametrize("fault", ["none", "refused", "refused later", "short"])
def test_data_of_any_offset_and_size_is_written(
    tmp_path: Path, start: int, size: int, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Direct and buffered writes, including file systems that refuse direct writes or write fewer bytes."""
    length, data = start + size + 7, random_tensor(torch.int8, (size,))
    (tmp_path / "x").write_bytes(b"." * length)
    file, pwrite, counts = DirectFile(tmp_path / "x"), os.pwrite, []
    direct = file._direct
    if direct is None:
        pytest.skip("this file system does not support O_DIRECT")

    def faulty_pwrite(descriptor: int, piece: memoryview, offset: int) -> int:
        if descriptor != direct:
            return pwrite(descriptor, piece, offset)
        if fault == "refused" or (fault == "refused later" and offset >= 8 << 20):
            raise OSError(errno.EINVAL, "not with this alignment")
        if fault == "short":
            counts.append(pwrite(file._stream.fileno(), piece[:5000], offset))
        else:
            counts.append(pwrite(descriptor, piece, offset))
        return counts[-1]

    monkeypatch.setattr(os, "pwrite", faulty_pwrite)
    file.write(start, byte_view(data))
    file.sync()
    file.close()
    file.close()
    assert (tmp_path / "x").read_bytes() == b"." * start + raw_bytes(data) + b"." * 7
    assert bool(counts) == (fault != "refused" and size >= 1 << 20)
    if fault == "none" and counts:
        assert size - 2 * 4096 < sum(counts) <= size


def test_full_disk_is_reported_by_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(bytes(3 << 20))
    file, pwrite = DirectFile(tmp_path / "x"), os.pwrite
    direct = file._direct
    if direct is None:
        pytest.skip("this file system does not support O_DIRECT")

    def full_disk_pwrite(descriptor: int, piece: memoryview, offset: int) -> int:
        if descriptor == direct:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, piece, offset)

    monkeypatch.setattr(os, "pwrite", full_disk_pwrite)
    with pytest.raises(OSError, match="No space left"):
        file.write(5, byte_view(torch.zeros(2 << 20, dtype=torch.uint8)))
    file.close()


# --- NaN and Inf ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 499, 999])
def test_tensor_with_nan_or_inf_is_refused(tmp_path: Path, dtype: torch.dtype, bad: float, position: int) -> None:
    tensor = random_tensor(dtype, (1000,))
    tensor[position] = bad
    write_tensors(tmp_path / "x.safetensors", {"layer.weight": tensor, "fine": torch.ones(3)})
    infos = read_header(tmp_path / "x.safetensors")
    with pytest.raises(QuantError, match=r"x\.safetensors: tensor layer\.weight holds NaN or Inf") as caught:
        load_finite(infos["layer.weight"])
    assert caught.value.hint == "fetch the checkpoint again"
    assert torch.equal(load_finite(infos["fine"]), torch.ones(3))


def test_finite_tensors_of_every_dtype_are_loaded(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", every_kind())
    for name, info in read_header(tmp_path / "x").items():
        assert_same(load_finite(info), every_kind()[name])
