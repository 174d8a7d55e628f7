"""Files that no honest tool writes: pipes and devices in a folder, media that point elsewhere, links out of an output,
code in a checkpoint, and files made to take all memory.
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
from msmodelslim_omni.calibration import media
from msmodelslim_omni.calibration import samples as calibration
from msmodelslim_omni.calibration.samples import load_calib_set
from msmodelslim_omni.doctor import examine
from msmodelslim_omni.files.atomic_write import write_aside
from msmodelslim_omni.files.untrusted import (
    MAX_DEPTH,
    open_regular,
    parse_json,
    read_regular,
    within_seconds,
)
from msmodelslim_omni.models import MODEL_TYPES, qwen2_5_media
from msmodelslim_omni.recipe.schema import MAX_RECIPE_BYTES, load_recipe
from msmodelslim_omni.storage.checkpoint import INDEX_NAME, load_json_object, open_checkpoint
from msmodelslim_omni.storage.safetensors_io import read_header

OMNI = MODEL_TYPES["Qwen2.5-Omni-7B"]
ROOT = Path(__file__).parents[2]


# --- what is no regular file ---------------------------------------------------------------------------------

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
def test_what_is_no_regular_file_is_refused_unread(name: str, device: str, tmp_path: Path) -> None:
    if device == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to({"zero": "/dev/zero", "kmsg": "/proc/kmsg"}[device])
    with pytest.raises(QuantError):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", INDEX_NAME, "tokenizer.json"])
def test_pipes_in_a_checkpoint(name: str, tiny_copy: Path) -> None:
    (tiny_copy / name).unlink(missing_ok=True)
    os.mkfifo(tiny_copy / name)
    if name != "tokenizer.json":
        with pytest.raises(QuantError):
            open_checkpoint(tiny_copy)
    examine(tiny_copy)
    command("doctor", tiny_copy)


def test_size_is_what_is_read_not_what_is_said(tmp_path: Path) -> None:
    """Files under /proc say that they have 0 bytes."""
    with pytest.raises(ValueError, match="at most 3 are read"):
        read_regular(Path("/proc/self/status"), 3)
    (tmp_path / "x").write_bytes(b"abc")
    assert read_regular(tmp_path / "x", 3) == b"abc"
    with pytest.raises(OSError, match="no regular file"):
        open_regular(Path("/dev/null"))


def test_a_recipe_of_a_gigabyte(tmp_path: Path) -> None:
    with (tmp_path / "my.yaml").open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(QuantError, match=rf"my\.yaml: .*{1 << 30} bytes; at most {MAX_RECIPE_BYTES} are read"):
        load_recipe(tmp_path / "my.yaml")


@pytest.mark.parametrize("claim", [100 << 30, 2**63, 2**64 - 1])
def test_a_claim_of_a_hundred_gigabytes_in_a_file_of_one_kilobyte(claim: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps({"a": {"dtype": "U8", "shape": [claim], "data_offsets": [0, claim]}}).encode()
    for content in (claim.to_bytes(8, "little"), len(header).to_bytes(8, "little") + header):
        path.write_bytes(content.ljust(1024, b" "))
        with pytest.raises(QuantError, match=r"model\.safetensors"):
            read_header(path)


# --- JSON ----------------------------------------------------------------------------------------------------


def test_depth_of_json() -> None:
    allowed = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(allowed)
    for levels in (MAX_DEPTH + 1, 500, 990, 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json('{"a":' * levels + "1" + "}" * levels)


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    """The library refuses a header's, and which of two answers was meant nobody knows."""
    entry = b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + entry + b"," + entry + b"}"
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(QuantError, match=r"x: .*the key 'a' stands twice"):
        read_header(tmp_path / "x")
    index = write_index(tmp_path, '{"text": "a", "answer": "b", "answer": "c"}')
    with pytest.raises(QuantError, match=r"index\.jsonl:1: .*'answer' stands twice"):
        load_calib_set(str(index), "D", OMNI)
    with pytest.raises(ValueError, match="stands twice"):  # in time that grows with the length alone
        parse_json("{" + "".join(f'"{n}":1,' for n in range(100_000)) + '"99999":2}', unique=True)


def test_messages_hold_nothing_that_a_terminal_obeys() -> None:
    shown = QuantError("\x1b[2J\r\ud800\u202e\x9b31m\tname.\nnext line").message
    assert shown == r"\x1b[2J\r\ud800\u202e\x9b31m\tname." + "\nnext line"
    assert QuantError("模型 é \u3000").message == "模型 é \u3000"
    assert len(QuantError("x" * 10**7).message) < 10_000


# --- samples without end -------------------------------------------------------------------------------------


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
def test_an_index_of_too_much(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "index.jsonl").write_text(content)
    with pytest.raises(QuantError, match=words):
        load_calib_set(str(tmp_path / "index.jsonl"), "D", OMNI)


# --- media ---------------------------------------------------------------------------------------------------

POINTERS = {
    "a list of files": b"ffconcat version 1.0\nfile inner.mp4\n",
    "a playlist": b"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ninner.mp4\n#EXT-X-ENDLIST\n",
    "a session": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"
    b"a=rtpmap:96 H264/90000\n",
    "a manifest": b'<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period/></MPD>\n',
}


@pytest.mark.parametrize("what", POINTERS)
@pytest.mark.parametrize(("kind", "name"), [("video", "a.mp4"), ("audio", "a.wav")])
def test_media_that_name_other_files(what: str, kind: str, name: str, tmp_path: Path) -> None:
    """FFmpeg would go where they say, on the disk or in the network."""
    write_video(tmp_path / "inner.mp4", 3, sound=True)
    (tmp_path / name).write_bytes(POINTERS[what])
    assert "cannot be decoded" in probe_error(kind, tmp_path / name)
    with pytest.raises(QuantError):
        media.load_audio(tmp_path / name)


def test_a_picture_that_is_a_program(tmp_path: Path) -> None:
    """Pillow would have Ghostscript run it."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) show\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(program)
    assert "cannot identify" in probe_error("image", tmp_path / "a.png")
    with pytest.raises(QuantError, match="cannot identify"):
        media.load_image(tmp_path / "a.png")


@pytest.mark.parametrize(("at", "value"), [(40, 1 << 30), (40, 2**32 - 1), (4, 2**32 - 1)])
def test_a_sound_that_claims_a_gigabyte(at: int, value: int, tmp_path: Path) -> None:
    """It is read for what is there, or refused."""
    path = write_wav(tmp_path / "a.wav", tone(1000), 16_000)
    content = bytearray(path.read_bytes())
    content[at : at + 4] = value.to_bytes(4, "little")
    path.write_bytes(content)
    try:
        media.probe("audio", path)
        assert len(media.load_audio(path)) == 1000
    except QuantError as error:
        assert "a.wav" in error.message


def test_a_sound_of_a_billion_samples_a_second(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone(1000), 1_000_000_000)
    with pytest.raises(QuantError, match=r"a\.wav' is sampled at 1000000000 Hz; the limit is 384000 Hz"):
        media.load_audio(path)


def test_a_sound_of_no_rate(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone(1000), 16_000)
    content = bytearray(path.read_bytes())
    content[24:28] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(QuantError, match=r"a\.wav"):
        media.load_audio(path)


def test_a_clip_whose_length_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of the header says one second; the frames are counted as they come."""
    path = write_video(tmp_path / "a.mp4", 20, rate=5)
    content = bytearray(path.read_bytes())
    for box in (b"mvhd", b"tkhd", b"mdhd"):
        place = content.index(box) + (24 if box == b"tkhd" else 20)
        content[place : place + 4] = (1000).to_bytes(4, "big")
    path.write_bytes(content)
    monkeypatch.setattr(media, "MAX_FRAMES", 10)
    with pytest.raises(QuantError, match=r"a\.mp4' is longer than 600 s or 10 frames"):
        media._read_video({"video": str(path), "fps": 2.0})


def test_a_picture_whose_text_unpacks_without_end(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    packed = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(4 << 20), 9)
    chunk = (len(packed) - 4).to_bytes(4, "big") + packed + zlib.crc32(packed).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    assert "cannot be decoded" in probe_error("image", tmp_path / "a.png")


def test_media_may_lie_anywhere_and_are_links_followed(tmp_path: Path) -> None:
    """The rule: an index is its user's; what it names is decoded, and copied nowhere."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link.png").symlink_to(DATA / "images" / "notice_zh.png")
    shutil.copy(DATA / "audio" / "three_beeps.wav", tmp_path / "beside.wav")
    index = write_index(tmp_path / "set", {"image": "link.png"}, {"audio": "../beside.wav"})
    assert len(load_calib_set(str(index), "D", OMNI).samples) == 2


# --- what --help says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["quant", "analyze", "eval", "generate"])
def test_limits_are_stated_in_help(verb: str) -> None:
    text = " ".join(command(verb, "--help").done().out.replace("│", " ").split())
    gibibytes, megapixels = media.MAX_FILE_BYTES >> 30, media.MAX_PIXELS // 10**6
    assert f"at most {gibibytes} GiB, {megapixels} megapixels, {media.MAX_SECONDS:.0f} s" in text
    if verb != "generate":
        assert f"{calibration.MAX_INDEX_BYTES >> 20} MiB and {calibration.MAX_SAMPLES} samples" in text
        assert f"{media.MAX_VIDEO_PIXELS // 10**6} megapixels in all" in text


# --- links in a folder of others -----------------------------------------------------------------------------


def test_writing_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for name in ("README.md", "README.md.partial"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).symlink_to(precious)
        write_aside(tmp_path / "out" / "README.md", "new")
        assert precious.read_text() == "precious"
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
def test_no_code_of_a_checkpoint_runs(
    damage: str, tiny_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tiny_copy / "evil.py").write_text("import pathlib\npathlib.Path('executed').touch()\nclass C: pass\n")
    if damage.startswith("template"):
        monkeypatch.setattr(qwen2_5_media, "_TEMPLATE_SECONDS", 1)
        ends = _TEMPLATES[damage]
        for name in ("chat_template.jinja", "chat_template.json"):
            (tiny_copy / name).unlink(missing_ok=True)
        (tiny_copy / "chat_template.json").write_text(json.dumps({"chat_template": ends}))
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


def test_a_call_that_takes_too_long_is_stopped() -> None:
    steps = count()

    def endless() -> None:
        for _ in steps:
            pass

    with pytest.raises(TimeoutError):
        within_seconds(endless, 0.1)
    time.sleep(0.5)  # for the thread to see that it is to end
    reached = next(steps)
    time.sleep(0.1)
    assert next(steps) == reached + 1
    assert within_seconds(lambda: 7, 10) == 7
    with pytest.raises(ZeroDivisionError):
        within_seconds(lambda: 1 // 0, 10)


# --- memory --------------------------------------------------------------------------------------------------

_WITHIN = """
import resource, sys, time
from pathlib import Path
from fuzz_targets import TARGETS
room, *words = sys.argv[1:]
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (int(room) << 20),) * 2)
for target, file in zip(words[::2], map(Path, words[1::2])):
    folder = file.with_suffix(".folder") / "folder"
    folder.mkdir(parents=True)
    began = time.process_time()
    TARGETS[target](folder, file.read_bytes())
    print(time.process_time() - began)
"""


def within(bombs: dict[str, tuple[str, bytes]], room: int, tmp_path: Path) -> float:
    """The most CPU seconds that one took, with so many MiB of memory left for them; MemoryError fails it."""
    words = []
    for number, (target, content) in enumerate(bombs.values()):
        (tmp_path / str(number)).write_bytes(content)
        words += [target, str(tmp_path / str(number))]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")])
    done = subprocess.run(
        [sys.executable, "-c", _WITHIN, str(room), *words],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return max(map(float, done.stdout.split()))


def header_of(body: bytes) -> bytes:
    return len(body).to_bytes(8, "little") + body


def filled(begin: bytes, piece: bytes, end: bytes, size: int) -> bytes:
    return begin + piece * ((size - len(begin) - len(end)) // len(piece)) + end


BOMBS: dict[str, tuple[str, bytes]] = {
    "recipe of aliases": ("recipe", b"a: &a [x]\n" + (b"a: &a [" + b"*a, " * 200 + b"*a]\n") * 8),
    "recipe of a million entries": ("recipe", filled(b"a: [", b"x,", b"x]\n", 1 << 20)),
    "recipe of a million lines": ("recipe", filled(b"", b"- a\n", b"", 1 << 20)),
    "recipe of one long number": ("recipe", filled(b"metadata: {score: ", b"59:", b"59.5}\n", 1 << 20)),
    "small index of faults": ("samples", b"5\n" * 100_000),
    "small header": ("safetensors", header_of(filled(b'{"a":[', b"{},", b"0]}", 1 << 20))),
}  # fmt: skip

LARGE_BOMBS: dict[str, tuple[str, bytes]] = {
    "header of objects": ("safetensors", header_of(filled(b'{"a":[', b"{},", b"0]}", 16 << 20))),
    "header of lists": ("safetensors", header_of(filled(b'{"a":[', b"[],", b"0]}", 16 << 20))),
    "index of the largest size": ("index", filled(b'{"weight_map":[', b"{},", b"0]}", 32 << 20)),
    "config of the largest size": ("config", filled(b'{"x":[', b"{},", b"0]}", 32 << 20)),
    "samples of one line": ("samples", filled(b'{"x":[', b"{},", b"0]}", 64 << 20)),
    "samples of many lines": ("samples", filled(b"", b'{"x":[' + b"{}," * 150 + b"0]}\n", b"", 45 << 20)),
}


def test_bombs(tmp_path: Path) -> None:
    assert within(BOMBS, 400, tmp_path) < 20


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bomb", LARGE_BOMBS)
def test_large_bombs(bomb: str, tmp_path: Path) -> None:
    assert within({bomb: LARGE_BOMBS[bomb]}, 2048, tmp_path) < 120
