"""Damaged and hostile files cause only QuantErrors, in bounded time and memory.

`make fuzz` runs the same targets under atheris; its findings are in REGRESSIONS. `pytest -m full` runs more examples.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz_targets import SEEDS, SHARD, TARGETS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CPU_SECONDS = 3.0  # limit for one file of a few kilobytes

# --- inputs --------------------------------------------------------------------------------------------------

NUMBERS = (-1, 0, 1, 2**31, 2**48, 2**63, 10**30, -(10**400), 0.5, 1e308, float("nan"), float("inf"), True, None)
TEXTS = (
    "", "x", "../x", "../outside.safetensors", "/etc/passwd", "a\0b", "\ud800", "\u202egnp.exe", "\x1b[2J", "n" * 300,
    "n" * 5000, "con\\x", ".", "..", "~", "U8", "F4", "BF16", SHARD, "red.png", "-1", "1e9", "awq",
)  # fmt: skip
BLOCKS: tuple[Any, ...] = (
    [], {}, [[]], [-1, 5], [0, 2**50], {"a": {}}, [None] * 20, ["../x"], [["a"]], {"type": "image", "image": "../x"},
    {"quant_method": []}, ["x"] * 2000,
)  # fmt: skip
NESTED = {f"{levels} levels": "[" * levels + "]" * levels for levels in (40, 70, 400, 900, 50_000)}
WEIRD = (*NUMBERS, *TEXTS, *BLOCKS, *NESTED)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a JSON value."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


@st.composite
def changed_values(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value in which one to three inner values are replaced, removed or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(value))
        if not paths:
            return value
        *parents, last = draw(st.sampled_from(paths))
        block = value
        for key in parents:
            block = block[key]
        change = draw(st.sampled_from(("replace", "replace", "remove", "rename")))
        if change == "replace":
            block[last] = copy.deepcopy(draw(st.sampled_from(WEIRD)))
        elif change == "remove" or isinstance(block, list):
            del block[last]
        else:
            block[draw(st.sampled_from(TEXTS))] = block.pop(last)
    return value


def dumped(value: Any) -> str:
    """The value as JSON, with the keys of NESTED replaced by deeply nested lists."""
    text = json.dumps(value)
    for word, nested in NESTED.items():
        text = text.replace(f'"{word}"', nested)
    return text


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes are changed, removed, repeated or inserted. A repeated piece may be a key, which then appears twice."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), first + draw(st.integers(1, 30)))
        change = draw(st.sampled_from(("flip", "cut", "double", "put")))
        if change == "flip" and data:
            data[first] = draw(st.integers(0, 255))
        elif change == "cut":
            del data[first:end]
        elif change == "double":
            data[first:first] = data[first:end]
        else:
            data[first:first] = draw(st.binary(max_size=12))
    return bytes(data)


def with_length(header: bytes, draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file, sometimes with a wrong header length."""
    length = draw(st.sampled_from((len(header), len(header), len(header), 0, 2**32, 100 << 30, 2**63)))
    return length.to_bytes(8, "little") + header + data


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    seed = SEEDS["safetensors"][0]
    header = json.loads(seed[8:-8])
    changed = dumped(draw(changed_values(header))).encode()
    return with_length(changed, draw, seed[-8:])


@st.composite
def json_lines(draw: st.DrawFn) -> bytes:
    entries = [json.loads(line) for line in SEEDS["samples"][0].splitlines()]
    return "\n".join(dumped(draw(changed_values(entry))) for entry in entries).encode()


def changed_json(target: str) -> st.SearchStrategy[bytes]:
    return changed_values(json.loads(SEEDS[target][0])).map(lambda value: dumped(value).encode())


# Lines with special meaning in YAML. Together, some of them expand exponentially.
YAML_LINES = (
    "a: &a [x, x, x, x, x, x, x, x, x]", "b: &b [*a, *a, *a, *a, *a, *a, *a, *a]", "c: &c [*b, *b, *b, *b, *b, *b]",
    "d: [*c, *c, *c, *c, *c, *c, *c, *c]", "e: &e [*e]", "f: &f {<<: *f}", "<<: [1, 2]", "? [a, b]", "? {a: b}",
    "g: !!python/object/apply:os.system [touch executed]", "h: !!python/name:os.system", "i: !!binary x",
    "k: " + ":".join(["59"] * 300), "l: " + ":".join(["59"] * 300) + ".5", "m: 0x" + "f" * 6000, "n: " + "9" * 6000,
    "o: 2001-99-99", "p: " + "[" * 900, "- x", "%YAML 9.9", "---", "...", "\tx: 1", '"\\uD800": 1', '"\\e[2J": 1',
    "spec: {}", "1: 2", "null: 3", "~: 4", "metadata: {label: {w_bit: 0x" + "f" * 6000 + ", a_bit: 1}}",
    "    - type: " + "n" * 3000, "  dataset: " + ":".join(["59"] * 300) + ".5",
)  # fmt: skip


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    seed = draw(st.sampled_from(SEEDS["recipe"])).decode()
    if draw(st.booleans()):
        return dumped(draw(changed_values(yaml.safe_load(seed)))).encode()
    lines = seed.split("\n")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines)))
        lines.insert(at, draw(st.sampled_from(YAML_LINES)))
    return "\n".join(lines).encode()


STRUCTURED: dict[str, st.SearchStrategy[bytes]] = {
    "safetensors": safetensors_files(),
    "index": changed_json("index"),
    "recipe": recipes(),
    "samples": json_lines(),
    "config": changed_json("config"),
    "manifest": changed_json("manifest"),
}


def any_files(target: str) -> st.SearchStrategy[bytes]:
    damaged = st.sampled_from(SEEDS[target]).flatmap(changed_bytes)
    return STRUCTURED[target] | STRUCTURED[target].flatmap(changed_bytes) | damaged | st.binary(max_size=300)


def safetensors_named(name: str) -> bytes:
    header = b'{"%s":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' % name.encode()
    return len(header).to_bytes(8, "little") + header


# --- tests ---------------------------------------------------------------------------------------------------


def run(target: str, folder: Path, content: bytes) -> None:
    began = time.process_time()
    TARGETS[target](folder, content)
    assert time.process_time() - began < CPU_SECONDS


@pytest.fixture
def folder() -> Iterator[Path]:
    """A temporary folder, in memory if possible, because every example syncs the manifest."""
    parent_folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=parent_folder) as parent:
        folder = Path(parent) / "folder"
        folder.mkdir()
        yield folder


def fuzz(target: str, folder: Path, examples: int) -> None:
    @given(any_files(target))
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # examples are small enough without shrinking
        suppress_health_check=list(HealthCheck),
    )
    def only_quant_errors(content: bytes) -> None:
        run(target, folder, content)

    only_quant_errors()


@pytest.mark.parametrize("target", TARGETS)
def test_fuzz(target: str, folder: Path) -> None:
    fuzz(target, folder, 30 if target == "recipe" else 120)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
def test_fuzz_at_length(target: str, folder: Path) -> None:
    fuzz(target, folder, 3_000)


def in_metadata(line: str) -> bytes:
    return SEEDS["recipe"][0].replace(b"metadata:", f"metadata:\n  {line}".encode(), 1)


# Inputs that broke a reader, found by fuzzing or by hand.
REGRESSIONS: dict[str, tuple[str, bytes]] = {
    "hexadecimal number too long to print": ("recipe", in_metadata(f"score: 0x{'f' * 6000}")),
    "base-60 fraction that overflows": ("recipe", in_metadata(f"score: {':'.join(['59'] * 300)}.5")),
    "nesting too deep to copy": ("config", b'{"a":' * 600 + b"1" + b"}" * 600),
    "block that is a string": ("config", b'{"model_type": "qwen2_5_omni", "thinker_config": {"text_config": "x"}}'),
    "method that is a list": ("config", b'{"model_type": "qwen2_5_omni", "quantization_config": {"quant_method": []}}'),
    "shard with a long name": ("index", b'{"weight_map": {"a": "' + b"n" * 5000 + b'.safetensors"}}'),
    "name with a lone surrogate": ("safetensors", safetensors_named("\\ud800")),
    "name with a terminal escape": ("safetensors", safetensors_named("\\u001b[2J")),
    "duplicate name": ("safetensors", safetensors_named('a":1,"a')),
    "manifest with a list of paths": ("manifest", b'{"fingerprint": [], "units": {}, "committing": ["../x"]}'),
    "manifest with a lone surrogate": (
        "manifest", b'{"fingerprint": {"seed": "0", "device": "cpu"}, "units": {}, "threads": "\\ud800"}'
    ),
    "manifest with a path outside the folder": (
        "manifest", b'{"fingerprint": {"seed": "0", "device": "cpu"}, "units": {}, "committing": ["../../precious"]}'
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REGRESSIONS)
def test_regression(name: str, folder: Path) -> None:
    target, content = REGRESSIONS[name]
    run(target, folder, content)


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_are_accepted(target: str, folder: Path) -> None:
    for content in SEEDS[target]:
        run(target, folder, content)
