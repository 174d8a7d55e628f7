"""Parse an index.jsonl or a list of prompts into CalibSamples, and turn each sample into model inputs.

The complete index is checked first. All errors (JSON, keys, files, media) are reported together, each with its line.
A sample is any non-empty subset of text, image, audio and video, or a conversation.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from ..errors import QuantError, nearest
from ..files import file_digest, find_index, parse_json, read_regular
from ..models import LayerInput, MediaProcessor, ModelInputs, ModelSpec, Stem
from ..runtime import is_device_fault
from . import media
from .clips import VideoClip
from .media import MediaFacts
from .shapes import MEDIA_KINDS, to_own_shape

KEYS = ("text", *MEDIA_KINDS, "use_audio_in_video", "system", "answer", "messages")
MAX_TEXT_CHARACTERS = 200_000
MAX_INDEX_BYTES = 64 << 20
MAX_SAMPLES = 100_000
MAX_SAMPLE_CHARACTERS = 4 << 20
MAX_INDEX_JSON_CHARACTERS = 16 << 20  # an index.json is parsed in one piece
MAX_PARTS = 1000  # turns per conversation, and parts per turn
_LISTED_ERRORS = 50
_LISTED_PLACES = 3  # per error
_MAX_ERRORS = 10_000


@dataclass(frozen=True)
class CalibSample:
    """One conversation.

    where: file and line, for error messages. messages: in the format of chat templates; each media part holds a checked
    Path. use_audio_in_video: whether the audio tracks of the videos are used. media: of each file, in order.
    """

    where: str
    messages: tuple[dict[str, Any], ...]
    use_audio_in_video: bool
    media: tuple[MediaFacts, ...] = ()

    @property
    def has_answer(self) -> bool:
        """Whether the last turn is the assistant's."""
        return bool(self.messages[-1]["role"] == "assistant")

    def files(self) -> list[Path]:
        parts = (p for m in self.messages for p in m["content"] if p["type"] in MEDIA_KINDS)
        return [part[part["type"]] for part in parts]

    def modalities(self) -> frozenset[str]:
        """The modalities of the sample's tokens: text, and the kinds of its media."""
        kinds = {part["type"] for message in self.messages for part in message["content"]} & set(MEDIA_KINDS)
        return frozenset({"text", *kinds, *(("audio",) if self.use_audio_in_video else ())})


class UnsupportedModality(QuantError):
    """A sample with media that the model does not take. Such samples are left out; the dataset is not at fault."""

    def __init__(self, kind: str, model: ModelSpec) -> None:
        supported = ", ".join(model.modalities)
        super().__init__(f"{kind} is not supported by {model.model_type}, which supports {supported}")
        self.kind = kind


@dataclass(frozen=True)
class CalibSet:
    """The calibration samples, the index that lists them, and a warning for each kind of skipped sample."""

    index: Path
    samples: tuple[CalibSample, ...]
    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        """The dataset's name, without the folders of this machine: of its folder, or of a file with another name."""
        is_plain = self.index.stem == "index"
        return (self.index.resolve().parent.name if is_plain else "") or self.index.name

    def identity(self) -> str:
        """Digest of the samples and of the bytes of all media files."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(repr((sample.messages, sample.use_audio_in_video)).encode())
            for file in sample.files():
                digest.update(self._file_digests[file].encode())
        return digest.hexdigest()

    @cached_property
    def _file_digests(self) -> dict[Path, str]:
        """The digest of each file, which many samples may share."""
        return {file: file_digest(file) for file in {file for sample in self.samples for file in sample.files()}}

    @cached_property
    def distinct_media(self) -> dict[str, int]:
        """The number of files with different content, by kind. Files of different sizes are not read.

        Counted once, when a run starts: it needs the files only until the towers have encoded them.
        """
        by_kind: dict[str, set[Path]] = {kind: set() for kind in MEDIA_KINDS}
        for sample in self.samples:
            for found, file in zip(sample.media, sample.files(), strict=True):
                by_kind[found.kind].add(file)
        return {kind: _count_distinct(files) for kind, files in by_kind.items() if files}


def _count_distinct(files: set[Path]) -> int:
    by_size: dict[int, list[Path]] = {}
    for file in files:
        by_size.setdefault(file.stat().st_size, []).append(file)
    return sum(len({file_digest(file) for file in alike}) if len(alike) > 1 else 1 for alike in by_size.values())


def describe_media(calib: CalibSet) -> str:
    """How many files the samples hold, as text: `11 images, 12 videos`; empty for text alone."""
    return ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in calib.distinct_media.items())


def same_media_warnings(calib: CalibSet) -> list[str]:
    """A warning for each kind of which all samples, four or more, hold the same file."""
    warnings = []
    for kind, count in calib.distinct_media.items():
        holders = sum(any(found.kind == kind for found in sample.media) for sample in calib.samples)
        if count == 1 and holders >= 4:
            warnings.append(f"all {holders} samples with {kind} hold the same file: calibration sees no other {kind}")
    return warnings


def load_calib_set(
    dataset: str,
    default_text: str,
    model: ModelSpec,
    *,
    max_samples: int | None = None,
    seed: int = 0,
    on_bad_sample: Literal["fail", "skip"] = "fail",
) -> CalibSet:
    """Read and check an index.

    default_text: the question of samples without a text. model: supplies the default system turn and the supported
    modalities. max_samples: if the index has more, a random choice with `seed` that serves every modality alike, in the
    order of the index.

    Samples with media that the model does not take are left out, with one warning per kind. Raises QuantError listing
    all errors with their lines; with on_bad_sample "skip" the errors become warnings.
    """
    media.require_libraries()
    index = find_index(dataset)
    samples: list[CalibSample] = []
    errors: list[tuple[str, str]] = []
    left_out: Counter[str] = Counter()
    known: KnownMedia = {}
    for where, entry in _read_entries(index):
        try:
            samples.append(parse_sample(where, entry, index.parent, default_text, model, known))
        except UnsupportedModality as error:
            left_out[error.kind] += 1
        except QuantError as error:
            errors += [(where, line) for line in error.message.split("\n")]
            if len(errors) > _MAX_ERRORS:
                first = ": ".join(errors[0])
                raise QuantError(f"{index}: more than {_MAX_ERRORS} errors; the first is: {first}") from error
    if errors and on_bad_sample == "fail":
        grouped = _grouped(errors)
        listed = grouped[:_LISTED_ERRORS] + (
            [f"... and {len(grouped) - _LISTED_ERRORS} more"] * (len(grouped) > _LISTED_ERRORS)
        )
        raise QuantError(
            f"the dataset has {len(errors)} error{'s' * (len(errors) > 1)}:\n" + "\n".join(listed),
            "fix them, or skip such samples with --on_bad_sample skip (in a recipe: calibration.on_bad_sample)",
        )
    omitted = [
        f"{count} sample{'s' * (count > 1)} with {kind} left out: {model.model_type} takes no {kind}"
        for kind, count in left_out.items()
    ]
    if not samples:
        raise QuantError("\n".join([f"{index}: no usable sample", *omitted]), 'add a line such as {"text": "Hello"}')
    if max_samples is not None and len(samples) > max_samples:
        samples = choose_by_modality(samples, max_samples, seed)
    return CalibSet(index, tuple(samples), (*omitted, *(f"sample skipped: {error}" for error in _grouped(errors))))


def _grouped(errors: list[tuple[str, str]]) -> list[str]:
    """One line per message, with the places of the samples that it is about."""
    places: dict[str, list[str]] = {}
    for where, message in errors:
        places.setdefault(message, []).append(where)
    lines = []
    for message, found in places.items():
        more = f" and {len(found) - _LISTED_PLACES} more" if len(found) > _LISTED_PLACES else ""
        lines.append(f"{', '.join(found[:_LISTED_PLACES])}{more}: {message}")
    return lines


def choose_by_modality(samples: Sequence[CalibSample], count: int, seed: int) -> list[CalibSample]:
    """Choose `count` of the samples, in their order, so that no modality is lost by chance.

    The samples are shuffled. Each step takes the next sample with the kind of media (or text alone) that was chosen
    least often so far; a sample with several kinds counts for each.
    """
    order = random.Random(seed).sample(range(len(samples)), len(samples))
    kinds = [sorted(sample.modalities() - {"text"}) or ["text"] for sample in samples]
    waiting: dict[str, list[int]] = {
        kind: [i for i in reversed(order) if kind in kinds[i]] for kind in ("text", *MEDIA_KINDS)
    }
    counts = dict.fromkeys(waiting, 0)
    chosen: set[int] = set()
    while len(chosen) < count:
        for queue in waiting.values():
            while queue and queue[-1] in chosen:
                queue.pop()
        kind = min((kind for kind, queue in waiting.items() if queue), key=counts.__getitem__)
        number = waiting[kind].pop()
        chosen.add(number)
        for other in kinds[number]:
            counts[other] += 1
    return [samples[i] for i in sorted(chosen)]


def missing_modality_warnings(samples: Sequence[CalibSample], modalities: Sequence[str], effect: str) -> list[str]:
    """A warning that names the modalities of the model that no sample has, or none. effect: what follows from that."""
    present = {modality for sample in samples for modality in sample.modalities()}
    absent = [modality for modality in modalities if modality not in present]
    return [f"no sample has {' or '.join(absent)}, which the model takes: {effect}"] if absent else []


def _read_entries(index: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, parsed JSON or a QuantError) for each sample of the index, parsed lazily."""
    try:
        text = read_regular(index, MAX_INDEX_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise QuantError(f"{index}: cannot be read: {error}", "the index must be JSON in UTF-8") from error
    if index.suffix == ".json":
        value = _parse_json(text, MAX_INDEX_JSON_CHARACTERS)
        if isinstance(value, QuantError):
            raise QuantError(f"{index}: {value.message}", "an index.json must hold one object or a list of objects")
        entries = value if isinstance(value, list) else [value]
        _check_sample_count(index, len(entries))
        yield from ((f"{index.name}[{i}]", entry) for i, entry in enumerate(entries))
        return
    _check_sample_count(index, text.count("\n"))
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{index.name}:{number}", {"text": line.strip()} if index.suffix == ".txt" else _parse_json(line)


def _check_sample_count(index: Path, count: int) -> None:
    if count > MAX_SAMPLES:
        raise QuantError(f"{index}: {count} samples; the limit is {MAX_SAMPLES}", "split the index")


def _parse_json(text: str, limit: int = MAX_SAMPLE_CHARACTERS) -> Any:
    """The parsed JSON, or a QuantError (returned, not raised)."""
    if len(text) > limit:
        return QuantError(f"{len(text)} characters; the limit is {limit}")
    try:
        return parse_json(text, unique=True)
    except ValueError as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return QuantError(f"not valid JSON: {reason}")


# --- one sample ----------------------------------------------------------------------------------------------


KnownMedia = dict[tuple[str, Path], MediaFacts | QuantError]


def parse_sample(
    where: str, entry: Any, folder: Path, default_text: str, model: ModelSpec, known: KnownMedia | None = None
) -> CalibSample:
    """Check one entry of an index. Raises one QuantError whose message has one line per error.

    known: what earlier entries found in files, which are not opened again; receives what this one finds.

    Raises UnsupportedModality, before any media file is opened, if the model does not take a kind of its media.
    """
    media.require_libraries()
    if isinstance(entry, QuantError):
        raise entry
    if not isinstance(entry, dict):
        raise QuantError(f"a sample must be a JSON object, not {type(entry).__name__}")
    errors: list[str] = []
    entry = to_own_shape(entry, errors)
    for key in entry:
        guess = nearest(key, KEYS, cutoff=0.7)
        if key not in KEYS and guess:  # users may add keys of their own (id, source, licence)
            errors.append(f"unknown key {key!r}.{guess}")
    if "messages" in entry:
        messages = _messages_of_conversation(entry, errors)
    else:
        messages = _messages_of_fields(entry, default_text, errors)
    messages = with_system(messages, model)
    kinds = {part["type"] for message in messages for part in message["content"]}
    if unsupported := sorted(kinds - set(model.modalities)):
        raise UnsupportedModality(unsupported[0], model)
    known = {} if known is None else known
    checked = [_check_part(part, folder, model, known, errors) for message in messages for part in message["content"]]
    facts = tuple(found for found in checked if found is not None)
    has_sound = [found.has_sound for found in facts if found.kind == "video"]
    use_audio = _use_audio_in_video(entry, has_sound, errors) and "audio" in model.modalities
    if errors:
        raise QuantError("\n".join(errors))
    return CalibSample(where, tuple(messages), use_audio, facts)


def with_system(messages: list[dict[str, Any]], model: ModelSpec) -> list[dict[str, Any]]:
    """The turns of a conversation behind the model's system prompt, if it has one and they do not."""
    if model.system and messages and messages[0]["role"] != "system":
        return [_message("system", [_text_part(model.system)]), *messages]
    return messages


def _messages_of_fields(entry: dict[str, Any], default_text: str, errors: list[str]) -> list[dict[str, Any]]:
    """The system turn (if given), the user turn (media, then text) and the assistant turn (if there is an answer)."""
    parts = []
    for kind in MEDIA_KINDS:
        value = entry.get(kind)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        parts += [{"type": kind, kind: file} for file in _limit_parts(listed, kind, errors)]
    question = _text_field(entry, "text", errors) or default_text
    answer = _text_field(entry, "answer", errors)
    system = _text_field(entry, "system", errors)
    return [
        *([_message("system", [_text_part(system)])] if system else []),
        _message("user", [*parts, _text_part(question)]),
        *([_message("assistant", [_text_part(answer)])] if answer else []),
    ]


def _text_field(entry: dict[str, Any], key: str, errors: list[str]) -> str:
    """The text under a key; "" if there is none."""
    value = entry.get(key)
    if value is None or value == "":
        return ""
    if not isinstance(value, str) or not value.strip():
        errors.append(f"{key} must be a non-empty string, not {str(value)[:40]!r}")
        return ""
    return value


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _message(role: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": role, "content": content}


def _messages_of_conversation(entry: dict[str, Any], errors: list[str]) -> list[dict[str, Any]]:
    """The turns under `messages`, with string contents converted to text parts."""
    conflicts = [key for key in ("text", "answer", "system", *MEDIA_KINDS) if key in entry]
    if conflicts:
        errors.append(f"messages cannot be combined with {', '.join(conflicts)}; give one or the other")
    turns = entry["messages"]
    if not isinstance(turns, list) or not turns:
        errors.append("messages must be a non-empty list of turns")
        return []
    messages = []
    for number, turn in enumerate(_limit_parts(turns, "messages", errors)):
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in ("system", "user", "assistant") or "content" not in turn:
            errors.append(f"messages[{number}] needs a role (system, user, assistant) and content")
            continue
        content = turn["content"]
        parts = [_text_part(content)] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts or not all(map(_is_content_part, parts)):
            errors.append(f"messages[{number}].content is neither a string nor a list of text/image/audio/video parts")
            continue
        kept = [{key: part[key] for key in ("type", part["type"])} for part in _limit_parts(parts, "content", errors)]
        messages.append(_message(role, kept))
    if messages and all(message["role"] == "system" for message in messages):
        errors.append("messages has no user turn")
    return messages


def _limit_parts(entries: list[Any], key: str, errors: list[str]) -> list[Any]:
    """The entries; an empty list if there are more than MAX_PARTS."""
    if len(entries) <= MAX_PARTS:
        return entries
    errors.append(f"{key} has {len(entries)} entries; the limit is {MAX_PARTS}")
    return []


def _is_content_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("text", *MEDIA_KINDS) and part["type"] in part


def _check_part(
    part: dict[str, Any], folder: Path, model: ModelSpec, known: KnownMedia, errors: list[str]
) -> MediaFacts | None:
    """Check a part and replace its file name by a Path. Returns what is known of a file; None for text and faults."""
    kind = part["type"]
    value = part[kind]
    if not isinstance(value, str) or not value:
        errors.append(f"{kind} must be a non-empty string, not {str(value)[:40]!r}")
    elif kind == "text":
        if len(value) > MAX_TEXT_CHARACTERS:
            errors.append(f"text has {len(value)} characters; the limit is {MAX_TEXT_CHARACTERS}")
    elif "://" in value or value.startswith("data:"):
        errors.append(f"{kind} {value[:80]!r} is a URL; only local files are supported")
    elif "\0" in value:
        errors.append(f"{kind} {value[:80]!r} is not a file name")
    else:
        part[kind] = folder / value
        if (kind, part[kind]) not in known:
            known[kind, part[kind]] = _probed(kind, part[kind], value, model)
        found = known[kind, part[kind]]
        if isinstance(found, MediaFacts):
            return found
        errors.append(found.message)
    return None


def _probed(kind: str, path: Path, name: str, model: ModelSpec) -> MediaFacts | QuantError:
    """The facts of a file, or what is wrong with it (returned, not raised)."""
    try:
        return media.probe(kind, path, model.least_sound_samples)
    except QuantError as error:
        return error
    except OSError as error:
        return QuantError(f"{kind} {name[:80]!r} cannot be read: {error.strerror}")


def _use_audio_in_video(entry: dict[str, Any], has_audio: list[bool], errors: list[str]) -> bool:
    """The entry's use_audio_in_video; by default, whether every video of the sample has an audio track."""
    requested = entry.get("use_audio_in_video")
    if requested is None:
        return bool(has_audio) and all(has_audio)
    if not isinstance(requested, bool):
        errors.append(f"use_audio_in_video is {str(requested)[:40]!r}, not true or false")
    elif requested and not all(has_audio):
        errors.append("use_audio_in_video is true, but a video of this sample has no audio track")
    return bool(requested) and bool(has_audio)


# --- model inputs --------------------------------------------------------------------------------------------


def describe_fault(sample: CalibSample, error: QuantError) -> str:
    """The error's message, prefixed with the sample's place unless the message already starts with it."""
    return error.message if error.message.startswith(sample.where) else f"{sample.where}: {error.message}"


def prepare_sample(sample: CalibSample, processor: MediaProcessor) -> ModelInputs:
    """Decode the sample's media and run the model's processor. Raises QuantError naming the sample's line."""
    try:
        messages = [_message(m["role"], [_decode_part(p, sample) for p in m["content"]]) for m in sample.messages]
        return processor.prepare(messages, sample.use_audio_in_video)
    except QuantError as error:
        raise QuantError(f"{sample.where}: {error.message}", error.hint) from error
    except Exception as error:  # samples are untrusted input, and the libraries' exceptions share no base class
        if is_device_fault(error):
            raise
        raise QuantError(f"{sample.where}: the model's processor rejected the sample: {error}") from error


def run_stem(sample: CalibSample, inputs: ModelInputs, stem: Stem) -> LayerInput:
    """Run towers and embedding. Whatever a sample makes them raise becomes a QuantError with the sample's line."""
    try:
        return stem.layer_input(inputs)
    except RuntimeError as error:
        if is_device_fault(error):
            raise
        reason = next(iter(str(error).splitlines()), "no details")
        raise QuantError(f"{sample.where}: the towers cannot process the sample: {reason}") from error


def _decode_part(part: dict[str, Any], sample: CalibSample) -> dict[str, Any]:
    """The part as models.MediaProcessor takes it."""
    kind = part["type"]
    if kind == "image":  # decoded and made smaller one after the other
        return {"type": kind, kind: partial(media.load_image, part[kind])}
    if kind == "audio":
        return {"type": kind, kind: media.load_audio(part[kind])}
    if kind == "video":
        sound = {"sound": media.load_audio(part[kind])} if sample.use_audio_in_video else {}
        return {"type": kind, kind: VideoClip(part[kind]), **sound}
    return part
