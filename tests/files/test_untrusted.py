"""Malicious files: pipes and devices in a folder, media that reference other files, links out of an output folder,
code in a checkpoint, and files that exhaust memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from command import DATA, command, quant, write_index
from media_files import probe_error, tone, write_video, write_wav

from msmodelslim_omni import QuantError
from msmodelslim_omni.calibration import containers, media, sample_frames
from msmodelslim_omni.calibration import samples as calibration
from msmodelslim_omni.calibration.samples import load_calib_set
from msmodelslim_omni.doctor import examine
from msmodelslim_omni.files.atomic_write import write_atomically
from msmodelslim_omni.files.untrusted import (
    MAX_JSON_CONTAINERS,
    MAX_JSON_DEPTH,
    call_with_timeout,
    open_regular,
    parse_json,
    read_regular,
)
from msmodelslim_omni.models import MODEL_TYPES, qwen2_5_media
from msmodelslim_omni.recipe.loading import MAX_RECIPE_BYTES, load_recipe
from msmodelslim_omni.storage.checkpoint import INDEX_NAME, load_json_object, open_checkpoint
from msmodelslim_omni.storage.safetensors_io import read_header

OMNI = MODEL_TYPES["Qwen2.5-Omni-7B"]
ROOT = Path(__file__).parents[2]


# --- files that are not regular ------------------------------------------------------------------------------

READERS: dict[str, Callable[[Path], object]] = {
    "config.json": load_json_object,
    "model.safetensors": read_header,
    "recipe.yaml": load_recipe,
    "index.jsonl": lambda path: load_calib_set(str(path), "D", OMNI),
    "index.json": lambda path: load_calib_set(str(path.parent), "D", OMNI),
    "a.png": lambda path: media.probe("image", path),
    "a.wav": lambda path: media.probe("audio", path),
}


@pytest.mark.parametrize("device", ["pipe", "zero", "kmsg"])
@pytest.mark.parametrize("name", READERS)
def test_only_regular_files_are_read(name: str, device: str, tmp_path: Path) -> None:
    if device == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to({"zero": "/dev/zero", "kmsg": "/proc/kmsg"}[device])
    with pytest.raises(QuantError):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", INDEX_NAME, "tokenizer.json"])
def test_pipe_in_a_checkpoint_is_refused(name: str, tiny_copy: Path) -> None:
    (tiny_copy / name).unlink(missing_ok=True)
    os.mkfifo(tiny_copy / name)
    if name != "tokenizer.json":
        with pytest.raises(QuantError):
            open_checkpoint(tiny_copy)
    examine(tiny_copy)
    command("doctor", tiny_copy)


def test_size_limit_counts_bytes_read(tmp_path: Path) -> None:
    """stat reports 0 bytes for files under /proc."""
    with pytest.raises(ValueError, match="the limit is 3"):
        read_regular(Path("/proc/self/status"), 3)
    (tmp_path / "x").write_bytes(b"abc")
    assert read_regular(tmp_path / "x", 3) == b"abc"
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(Path("/dev/null"))


def test_recipe_of_a_gigabyte_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "my.yaml").open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(QuantError, match=rf"my\.yaml: .*{1 << 30} bytes; the limit is {MAX_RECIPE_BYTES}"):
        load_recipe(tmp_path / "my.yaml")


@pytest.mark.parametrize("claim", [100 << 30, 2**63, 2**64 - 1])
def test_header_that_claims_more_bytes_than_the_file_has(claim: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps({"a": {"dtype": "U8", "shape": [claim], "data_offsets": [0, claim]}}).encode()
    for content in (claim.to_bytes(8, "little"), len(header).to_bytes(8, "little") + header):
        path.write_bytes(content.ljust(1024, b" "))
        with pytest.raises(QuantError, match=r"model\.safetensors"):
            read_header(path)


# --- JSON ----------------------------------------------------------------------------------------------------


def test_json_depth_limit() -> None:
    allowed = "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH
    assert parse_json(allowed)
    for levels in (MAX_JSON_DEPTH + 1, 500, 990, 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json('{"a":' * levels + "1" + "}" * levels)


def test_json_container_limit() -> None:
    """Two characters of an empty object take 90 bytes of memory."""
    with pytest.raises(ValueError, match=f"has {MAX_JSON_CONTAINERS + 1} objects and lists"):
        parse_json("[" + "{}," * (MAX_JSON_CONTAINERS - 1) + "{}]")


def test_duplicate_key_is_refused(tmp_path: Path) -> None:
    """safetensors refuses it in a header; in a sample, it is unknown which of two answers was meant."""
    entry = b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + entry + b"," + entry + b"}"
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(QuantError, match=r"x: .*the key 'a' appears twice"):
        read_header(tmp_path / "x")
    index = write_index(tmp_path, '{"text": "a", "answer": "b", "answer": "c"}')
    with pytest.raises(QuantError, match=r"index\.jsonl:1: .*'answer' appears twice"):
        load_calib_set(str(index), "D", OMNI)
    with pytest.raises(ValueError, match="appears twice"):  # in linear time
        parse_json("{" + "".join(f'"{n}":1,' for n in range(100_000)) + '"99999":2}', unique=True)


def test_messages_escape_terminal_control_characters() -> None:
    message = QuantError("\x1b[2J\r\ud800\u202e\x9b31m\tname.\nnext line").message
    assert message == r"\x1b[2J\r\ud800\u202e\x9b31m\tname." + "\nnext line"
    assert QuantError("模型 é \u3000").message == "模型 é \u3000"
    assert len(QuantError("x" * 10**7).message) < 10_000


# --- limits of the sample index ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("5\n" * 100_001, "100001 samples; the limit is 100000"),
        ("5\n" * 10_001, "more than 10000 errors"),
        (json.dumps({"image": ["a.png"] * 1001}), "image has 1001 entries; the limit is 1000"),
        (json.dumps({"messages": [{}] * 1001}), "messages has 1001 entries; the limit is 1000"),
        (
            json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 1001}]}),
            "content has 1001 entries; the limit is 1000",
        ),
        (json.dumps({"text": "a" * (4 << 20)}), "the limit is 4194304"),
    ],
)
def test_index_limits(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "index.jsonl").write_text(content)
    with pytest.raises(QuantError, match=words):
        load_calib_set(str(tmp_path / "index.jsonl"), "D", OMNI)


# --- media ---------------------------------------------------------------------------------------------------

POINTERS = {
    "list of files": b"ffconcat version 1.0\nfile inner.mp4\n",
    "playlist": b"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ninner.mp4\n#EXT-X-ENDLIST\n",
    "session": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"
    b"a=rtpmap:96 H264/90000\n",
    "manifest": b'<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period/></MPD>\n',
}


@pytest.mark.parametrize("pointer", POINTERS)
@pytest.mark.parametrize(("kind", "name"), [("video", "a.mp4"), ("audio", "a.wav")])
def test_media_that_reference_other_files(pointer: str, kind: str, name: str, tmp_path: Path) -> None:
    """FFmpeg would open the referenced files, on disk or over the network."""
    write_video(tmp_path / "inner.mp4", 3, sound=True)
    (tmp_path / name).write_bytes(POINTERS[pointer])
    assert "cannot be decoded" in probe_error(kind, tmp_path / name)
    with pytest.raises(QuantError):
        media.load_audio(tmp_path / name)


def test_picture_that_is_a_postscript_program(tmp_path: Path) -> None:
    """Pillow would run it with Ghostscript."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) show\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(program)
    assert "is no picture that Pillow reads" in probe_error("image", tmp_path / "a.png")
    with pytest.raises(QuantError, match="is no picture that Pillow reads"):
        media.load_image(tmp_path / "a.png")


@pytest.mark.parametrize(("at", "value"), [(40, 1 << 30), (40, 2**32 - 1), (4, 2**32 - 1)])
def test_sound_that_claims_a_gigabyte(at: int, value: int, tmp_path: Path) -> None:
    """Only the existing samples are read, or the file is refused."""
    path = write_wav(tmp_path / "a.wav", tone(1000), 16_000)
    content = bytearray(path.read_bytes())
    content[at : at + 4] = value.to_bytes(4, "little")
    path.write_bytes(content)
    try:
        media.probe("audio", path)
        assert len(media.load_audio(path)) == 1000
    except QuantError as error:
        assert "a.wav" in error.message


def test_sound_with_a_rate_above_the_limit(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone(1000), 1_000_000_000)
    with pytest.raises(QuantError, match=r"a\.wav' is sampled at 1000000000 Hz; the limit is 384000 Hz"):
        media.load_audio(path)


def test_sound_with_rate_zero(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone(1000), 16_000)
    content = bytearray(path.read_bytes())
    content[24:28] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(QuantError, match=r"a\.wav"):
        media.load_audio(path)


def test_clip_with_a_false_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All durations in the header are one second. Frames are counted while decoding."""
    path = write_video(tmp_path / "a.mp4", 20, rate=5)
    content = bytearray(path.read_bytes())
    for box in (b"mvhd", b"tkhd", b"mdhd"):
        offset = content.index(box) + (24 if box == b"tkhd" else 20)
        content[offset : offset + 4] = (1000).to_bytes(4, "big")
    path.write_bytes(content)
    monkeypatch.setattr(containers, "MAX_FRAMES", 10)
    with pytest.raises(QuantError, match=r"a\.mp4' is longer than 600 s or 10 frames"):
        sample_frames(path, 4)


def test_picture_with_a_decompression_bomb_in_its_text(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    chunk_body = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(4 << 20), 9)
    chunk = (len(chunk_body) - 4).to_bytes(4, "big") + chunk_body + zlib.crc32(chunk_body).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    assert "cannot be decoded" in probe_error("image", tmp_path / "a.png")


def test_media_may_be_anywhere_and_links_are_followed(tmp_path: Path) -> None:
    """The index is trusted by its user. Media that it names are decoded, and are not copied anywhere."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link.png").symlink_to(DATA / "images" / "notice_zh.png")
    shutil.copy(DATA / "audio" / "three_beeps.wav", tmp_path / "sibling.wav")
    index = write_index(tmp_path / "set", {"image": "link.png"}, {"audio": "../sibling.wav"})
    assert len(load_calib_set(str(index), "D", OMNI).samples) == 2


# --- limits in --help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["quant", "analyze", "eval", "generate"])
def test_limits_are_stated_in_help(verb: str) -> None:
    text = " ".join(command(verb, "--help").done().out.replace("│", " ").split())
    gibibytes, megapixels = media.MAX_FILE_BYTES >> 30, containers.MAX_PIXELS // 10**6
    assert f"at most {gibibytes} GiB, {megapixels} megapixels, {containers.MAX_SECONDS:.0f} s" in text
    if verb != "generate":
        assert f"{calibration.MAX_INDEX_BYTES >> 20} MiB and {calibration.MAX_SAMPLES} samples" in text


# --- links in a shared folder --------------------------------------------------------------------------------


def test_write_replaces_a_link_and_keeps_its_target(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("unchanged")
    for name in ("README.md", "README.md.partial"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).symlink_to(target)
        write_atomically(tmp_path / "out" / "README.md", "new")
        assert target.read_text() == "unchanged"
        assert (tmp_path / "out" / "README.md").read_text() == "new"
        assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["README.md"]


# --- code and templates in a checkpoint ----------------------------------------------------------------------

_TEMPLATES = {
    "template that runs code": '{{ cycler.__init__.__globals__.os.system("touch executed") }}',
    "template without end": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "template of loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize(
    "damage",
    ["template that runs code", "template without end", "template of loops", "auto_map", "tokenizer", "preprocessor"],
)
def test_code_of_a_checkpoint_is_not_executed(
    damage: str, tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tiny_copy / "evil.py").write_text("import pathlib\npathlib.Path('executed').touch()\nclass C: pass\n")
    if damage.startswith("template"):
        monkeypatch.setattr(qwen2_5_media, "_TEMPLATE_SECONDS", 1)
        template = _TEMPLATES[damage]
        for name in ("chat_template.jinja", "chat_template.json"):
            (tiny_copy / name).unlink(missing_ok=True)
        (tiny_copy / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    elif damage == "auto_map":
        for file in tiny_copy.glob("*config.json"):
            content = json.loads(file.read_text())
            kinds = ("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoFeatureExtractor")
            content["auto_map"] = dict.fromkeys(kinds, "evil.C")
            file.write_text(json.dumps(content))
    elif damage == "tokenizer":
        (tiny_copy / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "none"}}')
    else:
        (tiny_copy / "preprocessor_config.json").write_text('{"image_processor_type": [1], "size": -1}')
    index = write_index(tmp_path / "data", {"text": "Hello"})
    answer = quant(tiny_copy, tmp_path / "out", "--dataset", index)
    if damage == "auto_map":
        answer.done()
    else:
        assert ("chat template takes more than 1 s" in answer.fault()) == (damage == "template of loops")
    assert not (tmp_path / "executed").exists()


def test_call_is_stopped_after_the_timeout() -> None:
    steps = count()

    def endless() -> None:
        for _ in steps:
            pass

    with pytest.raises(TimeoutError):
        call_with_timeout(endless, 0.1)
    time.sleep(0.5)  # time for the thread to receive SystemExit
    reached = next(steps)
    time.sleep(0.1)
    assert next(steps) == reached + 1
    assert call_with_timeout(lambda: 7, 10) == 7
    with pytest.raises(ZeroDivisionError):
        call_with_timeout(lambda: 1 // 0, 10)


# --- memory --------------------------------------------------------------------------------------------------

_RUN_BOMBS = """
import resource, sys, time
from pathlib import Path
from fuzz_targets import TARGETS
mebibytes, *words = sys.argv[1:]
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (int(mebibytes) << 20),) * 2)
for target, file in zip(words[::2], map(Path, words[1::2])):
    folder = file.with_suffix(".folder") / "folder"
    folder.mkdir(parents=True)
    start = time.process_time()
    TARGETS[target](folder, file.read_bytes())
    print(time.process_time() - start)
"""


def slowest_bomb(bombs: dict[str, tuple[str, bytes]], mebibytes: int, tmp_path: Path) -> float:
    """CPU seconds of the slowest bomb. A bomb fails with MemoryError if it allocates more than `mebibytes`."""
    words = []
    for number, (target, content) in enumerate(bombs.values()):
        (tmp_path / str(number)).write_bytes(content)
        words += [target, str(tmp_path / str(number))]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")])
    run = subprocess.run(
        [sys.executable, "-c", _RUN_BOMBS, str(mebibytes), *words],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return max(map(float, run.stdout.split()))


def with_header_length(body: bytes) -> bytes:
    return len(body).to_bytes(8, "little") + body


def filled(start: bytes, piece: bytes, end: bytes, size: int) -> bytes:
    return start + piece * ((size - len(start) - len(end)) // len(piece)) + end


BOMBS: dict[str, tuple[str, bytes]] = {
    "recipe with aliases": ("recipe", b"a: &a [x]\n" + (b"a: &a [" + b"*a, " * 200 + b"*a]\n") * 8),
    "recipe with a million entries": ("recipe", filled(b"a: [", b"x,", b"x]\n", 1 << 20)),
    "recipe with a million lines": ("recipe", filled(b"", b"- a\n", b"", 1 << 20)),
    "recipe with one long number": ("recipe", filled(b"metadata: {score: ", b"59:", b"59.5}\n", 1 << 20)),
    "small index with errors": ("samples", b"5\n" * 100_000),
    "small header": ("safetensors", with_header_length(filled(b'{"a":[', b"{},", b"0]}", 1 << 20))),
}  # fmt: skip

LARGE_BOMBS: dict[str, tuple[str, bytes]] = {
    "header with objects": ("safetensors", with_header_length(filled(b'{"a":[', b"{},", b"0]}", 16 << 20))),
    "header with lists": ("safetensors", with_header_length(filled(b'{"a":[', b"[],", b"0]}", 16 << 20))),
    "index of maximum size": ("index", filled(b'{"weight_map":[', b"{},", b"0]}", 32 << 20)),
    "config of maximum size": ("config", filled(b'{"x":[', b"{},", b"0]}", 32 << 20)),
    "samples in one line": ("samples", filled(b'{"x":[', b"{},", b"0]}", 64 << 20)),
    "samples in many lines": ("samples", filled(b"", b'{"x":[' + b"{}," * 150 + b"0]}\n", b"", 45 << 20)),
}


def test_small_bombs(tmp_path: Path) -> None:
    assert slowest_bomb(BOMBS, 400, tmp_path) < 20


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bomb", LARGE_BOMBS)
def test_large_bombs(bomb: str, tmp_path: Path) -> None:
    assert slowest_bomb({bomb: LARGE_BOMBS[bomb]}, 2048, tmp_path) < 120
