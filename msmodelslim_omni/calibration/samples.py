"""index.jsonl, or a list of prompts -> CalibSample -> model inputs, one sample at a time.

Every fault of the whole index (JSON, keys, files, media) is found and listed with its line before anything else is
done. A sample is any non-empty subset of text, image, audio and video, or a whole conversation.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import QuantError, nearest
from ..files import file_digest, parse_json, read_regular, shipped_folder
from ..models import MediaProcessor, ModelInputs, ModelSpec
from . import media

MEDIA_KINDS = ("image", "audio", "video")
KEYS = ("text", *MEDIA_KINDS, "use_audio_in_video", "system", "answer", "messages")
MAX_TEXT_CHARACTERS = 200_000
MAX_INDEX_BYTES = 64 << 20
MAX_SAMPLES = 100_000
MAX_SAMPLE_CHARACTERS = 4 << 20
MAX_INDEX_JSON_CHARACTERS = 16 << 20  # of an index.json, which is parsed in one piece
MAX_PARTS = 1000  # turns of a conversation, or texts and media of a turn
_LISTED_FAULTS = 50
_MAX_FAULTS = 10_000


@dataclass(frozen=True)
class CalibSample:
    """One conversation. `messages` as chat templates take them, media parts holding a checked Path.

    where: file and line, for messages. use_audio_in_video: whether the clips' own sound is heard.
    """

    where: str
    messages: tuple[dict[str, Any], ...]
    use_audio_in_video: bool

    @property
    def answered(self) -> bool:
        """Whether its last turn is the assistant's."""
        return bool(self.messages[-1]["role"] == "assistant")

    def files(self) -> list[Path]:
        parts = (p for m in self.messages for p in m["content"] if p["type"] in MEDIA_KINDS)
        return [part[part["type"]] for part in parts]

    def modalities(self) -> frozenset[str]:
        """What its tokens are: text in any case, and the kinds of its media."""
        kinds = {part["type"] for message in self.messages for part in message["content"]} & set(MEDIA_KINDS)
        return frozenset({"text", *kinds, *(("audio",) if self.use_audio_in_video else ())})


@dataclass(frozen=True)
class CalibSet:
    """The samples to stream, where they came from, and what was said about those left out."""

    index: Path
    samples: tuple[CalibSample, ...]
    warnings: tuple[str, ...]

    def identity(self) -> str:
        """A digest of the samples and of every media file's bytes."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(repr((sample.messages, sample.use_audio_in_video)).encode())
            for file in sample.files():
                digest.update(file_digest(file).encode())
        return digest.hexdigest()


def load_calib_set(
    dataset: str,
    default_text: str,
    model: ModelSpec,
    *,
    max_samples: int | None = None,
    seed: int = 0,
    on_bad_sample: Literal["fail", "skip"] = "fail",
) -> CalibSet:
    """Read and check a whole index. More than max_samples: a seeded choice of them, in their order.

    model: its system turn stands before conversations that have none, and what it does not take is a fault.

    Raises QuantError listing all faults with their lines; with on_bad_sample "skip" they become warnings.
    """
    index = find_index(dataset)
    samples, faults = [], []
    for where, entry in _entries(index):
        try:
            samples.append(parse_sample(where, entry, index.parent, default_text, model))
        except QuantError as error:
            faults += [f"{where}: {line}" for line in error.message.split("\n")]
            if len(faults) > _MAX_FAULTS:
                raise QuantError(f"{index}: more than {_MAX_FAULTS} faults; the first: {faults[0]}") from error
    if faults and on_bad_sample == "fail":
        listed = faults[:_LISTED_FAULTS] + (
            [f"... and {len(faults) - _LISTED_FAULTS} more"] * (len(faults) > _LISTED_FAULTS)
        )
        raise QuantError(
            f"the dataset has {len(faults)} faults:\n" + "\n".join(listed),
            "mend them, or leave such samples out: `calibration: {on_bad_sample: skip}` in a recipe,"
            " `--on_bad_sample skip` for eval",
        )
    if not samples:
        raise QuantError(f"{index}: no usable sample", 'give at least one line such as {"text": "Hello"}')
    if max_samples is not None and len(samples) > max_samples:
        chosen = sorted(random.Random(seed).sample(range(len(samples)), max_samples))
        samples = [samples[i] for i in chosen]
    return CalibSet(index, tuple(samples), tuple(f"sample skipped: {fault}" for fault in faults))


def find_index(dataset: str) -> Path:
    """The index file: a path (absolute, or relative to the current folder), or a short name under lab_calib/."""
    candidates = [Path(dataset)]
    if Path(dataset).name == dataset:
        candidates.append(shipped_folder("lab_calib") / dataset)
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        shipped = sorted(p.name for p in shipped_folder("lab_calib").glob("*") if p.is_dir())
        raise QuantError(
            f"dataset {dataset!r} does not exist. Shipped: {', '.join(shipped)}.{nearest(dataset, shipped)}",
            "give an index.json, an index.jsonl, a folder that holds one, or a .txt with a prompt a line",
        )
    if found.is_file():
        return found
    inside = [found / name for name in ("index.jsonl", "index.json") if (found / name).is_file()]
    if len(inside) != 1:
        what = "both index.json and index.jsonl" if inside else "neither index.jsonl nor index.json"
        raise QuantError(f"dataset folder {str(found)!r} holds {what}", "give the path of the one that is meant")
    return inside[0]


def _entries(index: Path) -> Iterator[tuple[str, Any]]:
    """(where, parsed JSON or the QuantError that it raised) for each sample of the index, parsed as it is asked for."""
    try:
        text = read_regular(index, MAX_INDEX_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise QuantError(f"{index}: cannot be read: {error}", "the index is JSON in UTF-8") from error
    if index.suffix == ".json":
        value = _parse_json(text, MAX_INDEX_JSON_CHARACTERS)
        if isinstance(value, QuantError):
            raise QuantError(f"{index}: {value.message}", "an index.json is one object or a list of objects")
        entries = value if isinstance(value, list) else [value]
        _refuse_many(index, len(entries))
        yield from ((f"{index.name}[{i}]", entry) for i, entry in enumerate(entries))
        return
    _refuse_many(index, text.count("\n"))
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{index.name}:{number}", {"text": line.strip()} if index.suffix == ".txt" else _parse_json(line)


def _refuse_many(index: Path, count: int) -> None:
    if count > MAX_SAMPLES:
        raise QuantError(f"{index}: {count} samples; at most {MAX_SAMPLES} are read", "split it")


def _parse_json(text: str, limit: int = MAX_SAMPLE_CHARACTERS) -> Any:
    if len(text) > limit:
        return QuantError(f"{len(text)} characters; the limit is {limit}")
    try:
        return parse_json(text, unique=True)
    except ValueError as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return QuantError(f"not valid JSON: {reason}")


# --- one sample ----------------------------------------------------------------------------------------------


def parse_sample(where: str, entry: Any, folder: Path, default_text: str, model: ModelSpec) -> CalibSample:
    """Check one entry. Raises one QuantError whose message has a line per fault."""
    if isinstance(entry, QuantError):
        raise entry
    if not isinstance(entry, dict):
        raise QuantError(f"a sample is a JSON object, not {type(entry).__name__}")
    faults: list[str] = []
    for key in entry:
        guess = nearest(key, KEYS, cutoff=0.7)
        if key not in KEYS and guess:  # other keys (id, source, licence) are the user's own
            faults.append(f"unknown key {key!r}.{guess}")
    messages = _conversation(entry, faults) if "messages" in entry else _turns(entry, default_text, faults)
    if messages and messages[0]["role"] != "system":
        messages.insert(0, _message("system", [_text_part(model.system)]))
    kinds = {part["type"] for message in messages for part in message["content"]}
    for kind in sorted(kinds - set(model.modalities)):
        faults.append(f"{kind}: {model.model_type} does not take it; it takes {', '.join(model.modalities)}")
    tracks = [_check_part(part, folder, faults) for message in messages for part in message["content"]]
    has_sound = [track for track in tracks if track is not None]
    use_audio = _sound_choice(entry, has_sound, faults) and "audio" in model.modalities
    if faults:
        raise QuantError("\n".join(faults))
    return CalibSample(where, tuple(messages), use_audio)


def _turns(entry: dict[str, Any], default_text: str, faults: list[str]) -> list[dict[str, Any]]:
    """user (media, then text), the system turn before it and the answer after it where there is one."""
    parts = []
    for kind in MEDIA_KINDS:
        value = entry.get(kind)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        parts += [{"type": kind, kind: file} for file in _few(listed, kind, faults)]
    question = _text_of(entry, "text", faults) or default_text
    answer = _text_of(entry, "answer", faults)
    system = _text_of(entry, "system", faults)
    return [
        *([_message("system", [_text_part(system)])] if system else []),
        _message("user", [*parts, _text_part(question)]),
        *([_message("assistant", [_text_part(answer)])] if answer else []),
    ]


def _text_of(entry: dict[str, Any], key: str, faults: list[str]) -> str:
    value = entry.get(key)
    if value is None or value == "":
        return ""
    if not isinstance(value, str) or not value.strip():
        faults.append(f"{key} is {str(value)[:40]!r}, not a text")
        return ""
    return value


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _message(role: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": role, "content": content}


def _conversation(entry: dict[str, Any], faults: list[str]) -> list[dict[str, Any]]:
    """`messages` as chat templates take them, with string contents made parts."""
    beside = [key for key in ("text", "answer", "system", *MEDIA_KINDS) if key in entry]
    if beside:
        faults.append(f"messages stands beside {', '.join(beside)}; give the one or the others")
    turns = entry["messages"]
    if not isinstance(turns, list) or not turns:
        faults.append("messages is not a list of turns")
        return []
    messages = []
    for number, turn in enumerate(_few(turns, "messages", faults)):
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in ("system", "user", "assistant") or "content" not in turn:
            faults.append(f"messages[{number}] needs a role (system, user, assistant) and a content")
            continue
        content = turn["content"]
        parts = [_text_part(content)] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts or not all(map(_is_part, parts)):
            faults.append(f"messages[{number}].content is neither a text nor a list of text/image/audio/video parts")
            continue
        kept = [{key: part[key] for key in ("type", part["type"])} for part in _few(parts, "content", faults)]
        messages.append(_message(role, kept))
    if messages and all(message["role"] == "system" for message in messages):
        faults.append("messages holds no user turn")
    return messages


def _few(entries: list[Any], what: str, faults: list[str]) -> list[Any]:
    """The entries, or none of too many."""
    if len(entries) <= MAX_PARTS:
        return entries
    faults.append(f"{what} has {len(entries)} entries; the limit is {MAX_PARTS}")
    return []


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("text", *MEDIA_KINDS) and part["type"] in part


def _check_part(part: dict[str, Any], folder: Path, faults: list[str]) -> bool | None:
    """Check a part and turn its file into a Path. For a video: whether it has a sound track; else None."""
    kind = part["type"]
    value = part[kind]
    if not isinstance(value, str) or not value:
        faults.append(f"{kind} is {str(value)[:40]!r}, not a text")
    elif kind == "text":
        if len(value) > MAX_TEXT_CHARACTERS:
            faults.append(f"a text of {len(value)} characters; the limit is {MAX_TEXT_CHARACTERS}")
    elif "://" in value or value.startswith("data:"):
        faults.append(f"{kind} {value[:80]!r} is a URL; only local files are read")
    elif "\0" in value:
        faults.append(f"{kind} {value[:80]!r} is no file name")
    else:
        part[kind] = folder / value
        try:
            has_sound = media.probe(kind, part[kind])
        except QuantError as error:
            faults.append(error.message)
        except OSError as error:
            faults.append(f"{kind} {value[:80]!r} cannot be read: {error.strerror}")
        else:
            return has_sound if kind == "video" else None
    return None


def _sound_choice(entry: dict[str, Any], has_sound: list[bool], faults: list[str]) -> bool:
    """use_audio_in_video: as the entry says, else whether every clip of the sample has a sound track."""
    wanted = entry.get("use_audio_in_video")
    if wanted is None:
        return bool(has_sound) and all(has_sound)
    if not isinstance(wanted, bool):
        faults.append(f"use_audio_in_video is {str(wanted)[:40]!r}, not true or false")
    elif wanted and not all(has_sound):
        faults.append("use_audio_in_video is true, but a clip of this sample has no sound track")
    return bool(wanted) and bool(has_sound)


# --- to model inputs -----------------------------------------------------------------------------------------


def describe_fault(sample: CalibSample, error: QuantError) -> str:
    """The error's message, with the sample's place before it if it does not name that itself."""
    return error.message if error.message.startswith(sample.where) else f"{sample.where}: {error.message}"


def prepare_sample(sample: CalibSample, processor: MediaProcessor) -> ModelInputs:
    """Decode the sample's media and run the model's processor. Raises QuantError naming the sample's line."""
    try:
        messages = [_message(m["role"], [_decoded(p, sample) for p in m["content"]]) for m in sample.messages]
        return processor.prepare(messages, sample.use_audio_in_video)
    except QuantError as error:
        raise QuantError(f"{sample.where}: {error.message}", error.hint) from error
    except Exception as error:  # a sample is untrusted input, and what libraries raise over it has no common class
        raise QuantError(f"{sample.where}: the model's processor refused the sample: {error}") from error


def _clip(path: Path) -> str:
    """qwen_omni_utils reads clips itself, from a path."""
    media.ensure_video_reader()
    return str(path)


def _decoded(part: dict[str, Any], sample: CalibSample) -> dict[str, Any]:
    decoders: dict[str, Callable[[Path], Any]] = {
        "image": media.load_image,
        "audio": media.load_sound,
        "video": _clip,
    }
    kind = part["type"]
    if kind == "text":
        return part
    decoded = {"type": kind, kind: decoders[kind](part[kind])}
    if kind == "video" and sample.use_audio_in_video:
        decoded["sound"] = media.load_sound(part[kind])
    return decoded
