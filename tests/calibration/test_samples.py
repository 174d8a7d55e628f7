"""Parsing of the index: valid samples, and error messages that list every error with its line."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from msmodelslim_omni.calibration.samples import (
    MAX_INDEX_BYTES,
    MAX_TEXT_CHARACTERS,
    CalibSample,
    CalibSet,
    KnownMedia,
    choose_by_modality,
    describe_media,
    find_index,
    load_calib_set,
    missing_modality_warnings,
    parse_sample,
    prepare_sample,
    same_media_warnings,
)
from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.files.datasets import dataset_names
from msmodelslim_omni.files.resources import shipped_folder
from msmodelslim_omni.models import MODEL_TYPES
from msmodelslim_omni.models.inputs import MediaLimits

OMNI = MODEL_TYPES["Qwen2.5-Omni-7B"]
SHIPPED = shipped_folder("lab_calib") / "calibVideos"


@pytest.fixture(scope="session")
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of each kind. loud.mp4 has an audio track, silent.mp4 has none."""
    folder = tmp_path_factory.mktemp("media")
    Image.new("RGB", (32, 24), "red").save(folder / "red.png")
    Image.new("RGB", (32, 24), "blue").save(folder / "蓝色 图片.jpg")
    with wave.open(str(folder / "tone.wav"), "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes((np.sin(np.arange(4000) / 10) * 9000).astype("<i2").tobytes())
    (folder / "loud.mp4").write_bytes((SHIPPED / "videos" / "cat_pan_zh.mp4").read_bytes())
    with av.open(str(folder / "silent.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4, width=64, height=48, pix_fmt="yuv420p")
        for level in range(0, 200, 50):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return folder


@pytest.fixture
def folder(media_folder: Path, tmp_path: Path) -> Path:
    """A writable folder with links to the media files."""
    for file in media_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def write_lines(folder: Path, *entries: Any, name: str = "index.jsonl") -> str:
    """Write an index of these entries: JSON values, or bytes for raw lines."""
    lines = [entry if isinstance(entry, bytes) else json.dumps(entry, ensure_ascii=False).encode() for entry in entries]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return str(folder / name)


def load(folder: Path, *entries: Any, **options: Any) -> CalibSet:
    return load_calib_set(write_lines(folder, *entries), "Default?", OMNI, **options)


def load_errors(folder: Path, *entries: Any) -> list[str]:
    """The lines of the error message, without the first, which counts them."""
    with pytest.raises(QuantError) as caught:
        load(folder, *entries)
    first, *rest = caught.value.message.split("\n")
    assert first == ("the dataset has 1 error:" if len(rest) == 1 else f"the dataset has {len(rest)} errors:")
    assert "--on_bad_sample skip" in caught.value.hint
    return rest


def content_of(sample: CalibSample, role: str = "user") -> list[dict[str, Any]]:
    (message,) = [message for message in sample.messages if message["role"] == role]
    return list(message["content"])


def text_part(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


# --- samples -------------------------------------------------------------------------------------------------


def test_plain_text(folder: Path) -> None:
    (sample,) = load(folder, {"text": "Hello"}).samples
    assert sample.messages == (
        {"role": "system", "content": [text_part(OMNI.system)]},
        {"role": "user", "content": [text_part("Hello")]},
    )
    assert sample.where == "index.jsonl:1"
    assert sample.use_audio_in_video is False
    assert sample.files() == []


def test_system_and_answer(folder: Path) -> None:
    (sample,) = load(folder, {"text": "a", "system": "Be brief.", "answer": "b"}).samples
    assert [m["role"] for m in sample.messages] == ["system", "user", "assistant"]
    assert content_of(sample, "system") == [text_part("Be brief.")]
    assert content_of(sample, "assistant") == [text_part("b")]


def test_media_come_before_the_text(folder: Path) -> None:
    entry = {"text": "t", "video": "silent.mp4", "audio": "tone.wav", "image": ["red.png", "蓝色 图片.jpg"]}
    (sample,) = load(folder, entry).samples
    assert content_of(sample) == [
        {"type": "image", "image": folder / "red.png"},
        {"type": "image", "image": folder / "蓝色 图片.jpg"},
        {"type": "audio", "audio": folder / "tone.wav"},
        {"type": "video", "video": folder / "silent.mp4"},
        text_part("t"),
    ]
    assert [file.name for file in sample.files()] == ["red.png", "蓝色 图片.jpg", "tone.wav", "silent.mp4"]


@pytest.mark.parametrize("entry", [{"image": "red.png"}, {"image": "red.png", "text": ""}, {}])
def test_default_text(folder: Path, entry: dict[str, Any]) -> None:
    (sample,) = load(folder, entry).samples
    assert content_of(sample)[-1] == text_part("Default?")


def test_absolute_paths(folder: Path, media_folder: Path) -> None:
    (sample,) = load(folder, {"image": str(media_folder / "red.png")}).samples
    assert sample.files() == [media_folder / "red.png"]


@pytest.mark.parametrize(
    ("entry", "use_audio"),
    [
        ({"video": "loud.mp4"}, True),
        ({"video": "silent.mp4"}, False),
        ({"video": ["loud.mp4", "silent.mp4"]}, False),
        ({"video": "loud.mp4", "use_audio_in_video": False}, False),
        ({"video": "loud.mp4", "use_audio_in_video": True}, True),
        ({"text": "no video", "use_audio_in_video": True}, False),
    ],
)
def test_use_audio_in_video(folder: Path, entry: dict[str, Any], use_audio: bool) -> None:
    (sample,) = load(folder, entry).samples
    assert sample.use_audio_in_video is use_audio


def test_messages(folder: Path) -> None:
    turns = [
        {"role": "user", "content": [{"type": "image", "image": "red.png", "detail": "x"}, text_part("What?")]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Sure?"},
    ]
    (sample,) = load(folder, {"messages": turns}).samples
    assert sample.messages == (
        {"role": "system", "content": [text_part(OMNI.system)]},
        {"role": "user", "content": [{"type": "image", "image": folder / "red.png"}, text_part("What?")]},
        {"role": "assistant", "content": [text_part("Red.")]},
        {"role": "user", "content": [text_part("Sure?")]},
    )


def test_messages_with_a_system_turn(folder: Path) -> None:
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    (sample,) = load(folder, {"messages": turns}).samples
    assert [content_of(sample, role) for role in ("system", "user")] == [[text_part("S")], [text_part("U")]]


def test_unrelated_keys_are_ignored(folder: Path) -> None:
    assert len(load(folder, {"text": "a", "id": 5, "source": "x", "licence": "CC0"}).samples) == 1


# --- the index file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "count"), [({"text": "a"}, 1), ([{"text": "a"}, {"text": "b"}], 2), ([{"text": "a"}] * 5, 5)]
)
def test_index_json(folder: Path, value: Any, count: int) -> None:
    (folder / "index.json").write_text(json.dumps(value, indent=2))
    samples = load_calib_set(str(folder / "index.json"), "D", OMNI).samples
    assert len(samples) == count
    assert samples[-1].where == f"index.json[{count - 1}]"


def test_byte_order_mark_blank_lines_and_windows_line_endings(folder: Path) -> None:
    calib = load(folder, b"\xef\xbb\xbf" + b'{"text": "a"}\r', b"", b"   ", b'{"text": "b"}\r')
    assert [content_of(sample)[0]["text"] for sample in calib.samples] == ["a", "b"]
    assert [sample.where for sample in calib.samples] == ["index.jsonl:1", "index.jsonl:4"]


def test_unicode_line_separators_do_not_split_a_line(folder: Path) -> None:
    (sample,) = load(folder, {"text": "a\u2028b\u0085c"}).samples
    assert content_of(sample) == [text_part("a\u2028b\u0085c")]


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_empty_index(folder: Path, content: bytes) -> None:
    with pytest.raises(QuantError, match=r"index\.jsonl: no usable sample") as caught:
        load(folder, content)
    assert '{"text": "Hello"}' in caught.value.hint


def test_empty_list(folder: Path) -> None:
    (folder / "index.json").write_text("[]")
    with pytest.raises(QuantError, match="no usable sample"):
        load_calib_set(str(folder / "index.json"), "D", OMNI)


def test_invalid_index_json(folder: Path) -> None:
    (folder / "index.json").write_text('{"text": ')
    with pytest.raises(QuantError, match=r"index\.json: not valid JSON: Expecting value") as caught:
        load_calib_set(str(folder / "index.json"), "D", OMNI)
    assert "one object or a list" in caught.value.hint


def test_index_not_in_utf_8(folder: Path) -> None:
    with pytest.raises(QuantError, match=r"index\.jsonl: cannot be read") as caught:
        load(folder, b'{"text": "\xff"}')
    assert "UTF-8" in caught.value.hint


def test_index_above_the_size_limit(folder: Path) -> None:
    with (folder / "index.jsonl").open("wb") as stream:
        stream.truncate(MAX_INDEX_BYTES + 1)
    with pytest.raises(QuantError, match=f"the limit is {MAX_INDEX_BYTES}"):
        load_calib_set(str(folder / "index.jsonl"), "D", OMNI)


# --- finding the index ---------------------------------------------------------------------------------------


def test_folder_with_an_index(folder: Path) -> None:
    path = write_lines(folder, {"text": "a"})
    assert str(find_index(str(folder))) == path
    assert str(find_index(path)) == path


def test_folder_with_two_indices(folder: Path) -> None:
    write_lines(folder, {"text": "a"})
    write_lines(folder, {"text": "a"}, name="index.json")
    with pytest.raises(QuantError, match=r"contains both index\.json and index\.jsonl") as caught:
        find_index(str(folder))
    assert "give the path of the index file" in caught.value.hint


def test_folder_without_an_index(folder: Path) -> None:
    with pytest.raises(QuantError, match=r"neither index\.jsonl nor index\.json"):
        find_index(str(folder))


def test_short_name_and_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert find_index("calibVideos") == SHIPPED / "index.jsonl"
    (folder / "data").mkdir()
    write_lines(folder / "data", {"text": "a"})
    assert find_index("data") == Path("data/index.jsonl")
    assert find_index("./data/index.jsonl") == Path("data/index.jsonl")


def test_local_folder_takes_precedence_over_a_shipped_dataset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "calibVideos").mkdir()
    write_lines(folder / "calibVideos", {"text": "a"})
    assert find_index("calibVideos") == Path("calibVideos/index.jsonl")


@pytest.mark.parametrize(
    "name", ["calibVideo", "../calibVideos", "sub/../../lab_calib/calibVideos", "./calibVideos", "/none/calibVideos"]
)
def test_short_names_stay_inside_lab_calib(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(QuantError) as caught:
        find_index(name)
    assert f"dataset {name!r} does not exist. Shipped: calibVideos, prompts." in caught.value.message
    if name == "calibVideo":
        assert "Did you mean 'calibVideos'?" in caught.value.message


def test_only_folders_with_an_index_are_listed(tmp_path: Path) -> None:
    for name in ("mine", "__pycache__"):
        (tmp_path / name).mkdir()
    write_lines(tmp_path / "mine", {"text": "a"})
    assert dataset_names(tmp_path) == ["mine"]


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_dots_name_local_folders(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "inner").mkdir()
    monkeypatch.chdir(folder / "inner")
    with pytest.raises(QuantError, match="neither"):
        find_index(name)


# --- errors of samples ---------------------------------------------------------------------------------------

SAMPLE_ERRORS: list[tuple[Any, str]] = [
    (b"{not json}", "not valid JSON: Expecting property name enclosed in double quotes at column 2"),
    (b'{"text": "a"} x', "not valid JSON: Extra data at column 15"),
    (b"[" * 100_000, "not valid JSON"),
    (5, "a sample must be a JSON object, not int"),
    (["text"], "a sample must be a JSON object, not list"),
    (None, "a sample must be a JSON object, not NoneType"),
    ({"txet": "a"}, "unknown key 'txet'. Did you mean 'text'?"),
    ({"imagge": "red.png"}, "unknown key 'imagge'. Did you mean 'image'?"),
    ({"text": "   "}, "text must be a non-empty string, not '   '"),
    ({"text": 5}, "text must be a non-empty string, not '5'"),
    ({"text": "a", "answer": ["b"]}, "answer must be a non-empty string"),
    ({"text": "a", "system": "\n"}, "system must be a non-empty string, not '\\n'"),
    ({"text": "a" * (MAX_TEXT_CHARACTERS + 1)}, "text has 200001 characters; the limit is 200000"),
    ({"image": "none.png"}, "none.png' does not exist"),
    ({"image": ""}, "image must be a non-empty string, not ''"),
    ({"image": 5}, "image must be a non-empty string, not '5'"),
    ({"image": ["red.png", None]}, "image must be a non-empty string, not 'None'"),
    ({"image": {"name": "red.png"}}, "image must be a non-empty string, not "),
    ({"image": "tone.wav"}, "is no image; its content can be given as audio"),
    ({"audio": "red.png"}, "is no audio; its content can be given as image"),
    ({"video": "red.png"}, "is no video; its content can be given as image"),
    ({"image": "https://example.com/a"}, "image 'https://example.com/a' is a URL; only local files are supported"),
    ({"video": "file:///etc/passwd"}, "is a URL"),
    ({"image": "data:image/png;base64,AAAA"}, "is a URL"),
    ({"image": "a\0.png"}, "is not a file name"),
    ({"image": "."}, "is a folder"),
    ({"image": "x" * 5000 + ".png"}, "cannot be read"),
    ({"video": "loud.mp4", "use_audio_in_video": "yes"}, "use_audio_in_video is 'yes', not true or false"),
    ({"video": "silent.mp4", "use_audio_in_video": True}, "is true, but a video of this sample has no audio track"),
    ({"messages": []}, "messages must be a non-empty list of turns"),
    ({"messages": "hello"}, "messages must be a non-empty list of turns"),
    ({"messages": [{"role": "user", "content": "a"}], "text": "b"}, "messages cannot be combined with text"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0] needs a role (system, user, assistant)"),
    ({"messages": [{"role": "user"}]}, "messages[0] needs a role (system, user, assistant) and content"),
    ({"messages": [5]}, "messages[0] needs a role"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content is neither a string nor a list"),
    ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content is neither"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "messages have 1 placeholder of image, and image lists 0 files",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "text must be a non-empty string, not '5'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "expected"), SAMPLE_ERRORS)
def test_error_of_a_sample(folder: Path, entry: Any, expected: str) -> None:
    (error,) = load_errors(folder, {"text": "good"}, entry)
    assert error.startswith("index.jsonl:2: ")
    assert expected in error
    assert len(error) < 6000


def test_folder_in_place_of_a_file(folder: Path) -> None:
    (folder / "dir.png").mkdir()
    (error,) = load_errors(folder, {"image": "dir.png"})
    assert "is a folder" in error


def test_all_errors_of_all_lines_are_listed(folder: Path) -> None:
    errors = load_errors(
        folder,
        {"image": "none.png", "audio": "none.wav", "text": 5},
        {"text": "good"},
        b"{",
        {"video": "none.mp4"},
    )
    assert [line.split(":")[1] for line in errors] == ["1", "1", "1", "3", "4"]


def test_long_error_lists_are_shortened(folder: Path) -> None:
    with pytest.raises(QuantError) as caught:
        load(folder, *({"image": f"{number}.png"} for number in range(1000)))
    lines = caught.value.message.split("\n")
    assert lines[0] == "the dataset has 1000 errors:"
    assert len(lines) == 52 and lines[-1] == "... and 950 more"


def test_samples_with_the_same_error_share_a_line(folder: Path) -> None:
    with pytest.raises(QuantError) as caught:
        load(folder, *[5] * 220)
    where = "index.jsonl:1, index.jsonl:2, index.jsonl:3 and 217 more"
    assert caught.value.message == f"the dataset has 220 errors:\n{where}: a sample must be a JSON object, not int"


def test_on_bad_sample_skip(folder: Path) -> None:
    calib = load(folder, {"image": "none.png"}, {"text": "good"}, b"{", on_bad_sample="skip")
    assert [sample.where for sample in calib.samples] == ["index.jsonl:2"]
    assert len(calib.warnings) == 2
    assert calib.warnings[0].startswith("sample skipped: index.jsonl:1: image ")
    assert calib.warnings[1].startswith("sample skipped: index.jsonl:3: not valid JSON")


def test_skipping_everything_is_an_error(folder: Path) -> None:
    with pytest.raises(QuantError, match="no usable sample"):
        load(folder, {"image": "none.png"}, on_bad_sample="skip")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("red.png"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "image", "video"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["text", "image", "messages", "answer", "use_audio_in_video"]), JSON_VALUES))
@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzz_entries(folder: Path, entry: dict[str, Any]) -> None:
    (folder / "index.jsonl").write_text(json.dumps(entry))
    try:
        load_calib_set(str(folder / "index.jsonl"), "D", OMNI)
    except QuantError as error:
        assert error.message


# --- selection and identity ----------------------------------------------------------------------------------


def texts_of(calib: CalibSet) -> list[str]:
    return [content_of(sample)[0]["text"] for sample in calib.samples]


def test_max_samples_selects_by_seed_and_keeps_the_order(folder: Path) -> None:
    entries = [{"text": f"{i:03d}"} for i in range(100)]
    chosen = texts_of(load(folder, *entries, max_samples=10, seed=1))
    assert len(set(chosen)) == 10
    assert chosen == sorted(chosen)
    assert chosen == texts_of(load(folder, *entries, max_samples=10, seed=1))
    assert chosen != texts_of(load(folder, *entries, max_samples=10, seed=2))
    assert chosen != [f"{i:03d}" for i in range(10)]


def sample_with(number: int, *kinds: str) -> CalibSample:
    parts = [*({"type": kind, kind: Path(f"{number}.{kind}")} for kind in kinds), {"type": "text", "text": f"{number}"}]
    return CalibSample(f"index.jsonl:{number}", ({"role": "user", "content": parts},), False)


@pytest.mark.parametrize("seed", range(5))
def test_max_samples_serves_every_modality(seed: int) -> None:
    """97 texts and one sample of each kind of media: a plain random choice of 8 would lose the media."""
    samples = [sample_with(n) for n in range(97)]
    samples += [sample_with(97, "image"), sample_with(98, "audio"), sample_with(99, "video", "audio")]
    chosen = choose_by_modality(samples, 8, seed)
    assert len(chosen) == 8 and chosen == sorted(chosen, key=lambda sample: int(sample.where.split(":")[1]))
    assert {kind for sample in chosen for kind in sample.modalities()} == {"text", "image", "audio", "video"}
    assert choose_by_modality(samples, 100, seed) == samples


def test_a_modality_that_no_sample_has_is_a_warning() -> None:
    samples = [sample_with(0), sample_with(1, "audio")]
    assert missing_modality_warnings(samples, ("text", "image", "audio", "video"), "nothing is known of them") == [
        "no sample has image or video, which the model takes: nothing is known of them"
    ]
    assert missing_modality_warnings(samples, ("text", "audio"), "") == []


def test_max_samples_above_the_number_of_samples(folder: Path) -> None:
    assert texts_of(load(folder, {"text": "a"}, {"text": "b"}, max_samples=2)) == ["a", "b"]
    assert texts_of(load(folder, {"text": "a"}, {"text": "b"}, max_samples=9)) == ["a", "b"]


def test_identity_changes_with_text_and_bytes(folder: Path) -> None:
    base = {"text": "a", "image": "red.png"}
    before = load(folder, base).identity()
    assert load(folder, base).identity() == before
    assert load(folder, {**base, "text": "b"}).identity() != before
    (folder / "red.png").unlink()
    Image.new("RGB", (32, 24), "green").save(folder / "red.png")
    assert load(folder, base).identity() != before


def test_distinct_media_are_counted_by_content(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "red.png").read_bytes())
    Image.new("RGB", (32, 24), "blue").save(folder / "blue.png")
    calib = load(
        folder, {"image": "red.png"}, {"image": ["copy.png", "blue.png"]}, {"audio": "tone.wav"}, {"text": "a"}
    )
    assert calib.distinct_media == {"image": 2, "audio": 1}
    assert describe_media(calib) == "2 images, 1 audio"
    assert same_media_warnings(calib) == []
    assert load(folder, {"text": "a"}).distinct_media == {}


def test_the_same_file_in_every_sample_is_a_warning(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "red.png").read_bytes())
    entries = [{"image": ("red.png", "copy.png")[n % 2], "text": str(n)} for n in range(4)]
    assert same_media_warnings(load(folder, *entries[:3])) == []
    (warning,) = same_media_warnings(load(folder, *entries, {"text": "a"}))
    assert warning == "all 4 samples with image hold the same file: calibration sees no other image"


def test_a_file_is_checked_once(folder: Path) -> None:
    entry = {"image": "red.png", "video": "loud.mp4"}
    known: KnownMedia = {}
    first = parse_sample("a:1", entry, folder, "D", OMNI, known)
    (folder / "red.png").unlink()
    assert parse_sample("a:1", entry, folder, "D", OMNI, known) == first
    with pytest.raises(QuantError, match="does not exist"):
        parse_sample("a:1", entry, folder, "D", OMNI)


def test_identity_changes_with_use_audio_in_video(folder: Path) -> None:
    with_audio, without = (load(folder, {"video": "loud.mp4", "use_audio_in_video": u}) for u in (True, False))
    assert with_audio.identity() != without.identity()


# --- the model's processor ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(tiny: Path) -> Any:
    from msmodelslim_omni.models import MODEL_TYPES

    family = MODEL_TYPES["Qwen2.5-Omni-7B"].family
    return family.open_media_processor(tiny, MediaLimits(600, 50176, 2.0), False)


def test_modalities_of_a_prepared_sample(folder: Path, processor: Any) -> None:
    (sample,) = load(folder, {"image": "red.png", "audio": "tone.wav", "text": "t"}).samples
    inputs = prepare_sample(sample, processor)
    assert inputs.modality.bincount(minlength=4).gt(0).tolist() == [True, True, True, False]
    assert len(inputs.modality) == inputs.tensors["input_ids"].shape[1]


def test_error_on_too_many_tokens_names_the_line(folder: Path, processor: Any) -> None:
    (sample,) = load(folder, {"text": "word " * 2000}).samples
    with pytest.raises(QuantError, match=r"^index\.jsonl:1: the sample has \d+ tokens, more than") as caught:
        prepare_sample(sample, processor)
    assert "max_tokens 600" in caught.value.message
    assert "raise max_tokens" in caught.value.hint


def test_error_on_a_lone_surrogate_names_the_line(folder: Path, processor: Any) -> None:
    """A lone surrogate is valid JSON but not valid text."""
    try:
        (sample,) = load(folder, b'{"text": "\\ud800"}').samples
        prepare_sample(sample, processor)
    except QuantError as error:
        assert "index.jsonl:1" in error.message


def test_file_damaged_after_the_check(folder: Path, processor: Any) -> None:
    (sample,) = load(folder, {"image": "red.png"}).samples
    (folder / "red.png").unlink()
    (folder / "red.png").write_bytes(b"not an image")
    with pytest.raises(QuantError, match=r"^index\.jsonl:1: image .*red\.png' cannot be decoded"):
        prepare_sample(sample, processor)


def test_checkpoint_without_a_processor(tmp_path: Path) -> None:
    from msmodelslim_omni.models import MODEL_TYPES

    family = MODEL_TYPES["Qwen2.5-Omni-7B"].family
    with pytest.raises(QuantError, match=r"processor .* cannot be loaded") as caught:
        family.open_media_processor(tmp_path, MediaLimits(600, None, 2.0), False)
    assert "data-free" in caught.value.hint


# --- the shipped dataset -------------------------------------------------------------------------------------


def test_shipped_dataset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    calib = load_calib_set("calibVideos", "Default?", OMNI)
    assert len(calib.samples) >= 32
    assert calib.warnings == ()
    kinds = [frozenset(p["type"] for p in user_parts(sample)) - {"text"} for sample in calib.samples]
    assert {frozenset(), frozenset({"image"}), frozenset({"audio"}), frozenset({"video"})} <= set(kinds)
    assert frozenset({"image", "audio", "video"}) in kinds
    assert {sample.use_audio_in_video for sample in calib.samples} == {True, False}
    texts = ["".join(p.get("text", "") for p in user_parts(sample)) for sample in calib.samples]
    chinese = sum(any("\u4e00" <= c <= "\u9fff" for c in words) for words in texts)
    assert 8 <= chinese <= len(texts) - 8
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 15_000_000


def user_parts(sample: CalibSample) -> list[dict[str, Any]]:
    return [part for message in sample.messages for part in message["content"] if message["role"] != "system"]


def test_every_shipped_file_is_used() -> None:
    used = {file.resolve() for sample in load_calib_set("calibVideos", "D", OMNI).samples for file in sample.files()}
    shipped = {f for kind in ("images", "audio", "videos") for f in (SHIPPED / kind).iterdir()}
    assert {file.resolve() for file in shipped} == used
    assert (SHIPPED / "ATTRIBUTION.md").is_file()
