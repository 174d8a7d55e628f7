"""Other shapes of samples, converted to the shape of index.jsonl.

LLaVA and ShareGPT (`conversations`), ms-swift (`messages` with `<image>` and lists of files; `query`, `response`,
`history`), Alpaca (`instruction`, `input`, `output`), TRL (`prompt` and `completion`, as text or turns), and the parts
of OpenAI's and Hugging Face's chats (`image_url`, `input_audio`, `{"type": "image", "url": ...}`).
What could hold content and is not read is refused, never ignored. Left out on purpose: files; samples.py checks them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

MEDIA_KINDS = ("image", "audio", "video")

_ALIASES = {
    "prompt": "text", "question": "text", "query": "text", "instruction": "text", "input": "text",
    "response": "answer", "completion": "answer", "output": "answer",
    "images": "image", "audios": "audio", "videos": "video",
    "conversations": "messages", "system_prompt": "system",
}  # fmt: skip

# Keys that datasets use for content. Without them, the sample would be another one than the user gave.
_CONTENT_KEYS = frozenset({
    "caption", "captions", "conversation", "dialog", "dialogue", "context", "content", "chosen", "rejected", "choices",
    "options", "passage", "document", "img", "imgs", "picture", "photo", "image_path", "image_file", "image_url",
    "audio_path", "audio_file", "audio_url", "speech", "sound", "wav", "video_path", "video_file", "video_url", "clip",
    "frames", "url", "file", "file_name", "path", "bytes", "transcript", "transcription", "tools",
})  # fmt: skip
_IGNORED_LIMITS = frozenset({
    "min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width", "fps", "nframes", "min_frames",
    "max_frames", "video_start", "video_end", "audio_start", "audio_end", "start", "end",
})  # fmt: skip

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bot": "assistant", "system": "system", "developer": "system",
}  # fmt: skip
_TAG = re.compile(r"<(image|audio|video)>")
_HTML_TAGS = ("audio", "video")  # without a file these are text about HTML
_INLINE_FILE = re.compile(r"<(img|audio|video)>([^<>\n]{1,300})</\1>")


def to_own_shape(entry: dict[str, Any], errors: list[str]) -> dict[str, Any]:
    """The sample under the keys of index.jsonl, with the file of every placeholder. Appends to `errors`."""
    present = {key: value for key, value in entry.items() if value is not None and value != "" and value != []}
    read = {*_ALIASES, *_CONTENT_KEYS, "history"}
    own = {key: value for key, value in entry.items() if key not in read}
    for key in sorted(_CONTENT_KEYS & present.keys()):
        errors.append(f"key {key!r} may hold content and is not read; name it text, answer, image, audio or video")
    if "instruction" in present and isinstance(present.get("input"), str) and isinstance(present["instruction"], str):
        present["instruction"] += "\n" + present.pop("input")
    for alias in [key for key in present if key in _ALIASES]:
        name, value = _ALIASES[alias], present[alias]
        if alias in ("prompt", "completion") and isinstance(value, list):
            before = own.get("messages")
            own["messages"] = [*(before if isinstance(before, list) else []), *value]
        elif own.get(name) in (None, "", []):
            own[name] = value
        else:
            errors.append(f"{alias} and {name} both give the {name}; keep one")
    for kind, files in _files(own).items():
        if files:
            own[kind] = files
    _add_history(own, present.get("history"), errors)
    if isinstance(own.get("messages"), list) and own["messages"]:
        own["messages"] = [_own_turn(turn, errors) for turn in own["messages"]]
        _add_system(own)
        return _with_files_in_turns(own, errors)
    return _with_files_in_text(own, errors)


# --- turns ---------------------------------------------------------------------------------------------------


def _add_history(own: dict[str, Any], history: Any, errors: list[str]) -> None:
    """Earlier turns, [[question, answer], ...], in front of the text."""
    if history is None:
        return
    is_pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if "messages" in own or not is_pairs:
        errors.append("history must be a list of [question, answer], beside a text")
        return
    roles = ("user", "assistant")
    turns = [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]
    turns.append({"role": "user", "content": own.pop("text", "")})
    if "answer" in own:
        turns.append({"role": "assistant", "content": own.pop("answer")})
    own["messages"] = turns


def _add_system(own: dict[str, Any]) -> None:
    """A system text beside turns that have none becomes the first turn."""
    turns = own["messages"]
    if isinstance(own.get("system"), str) and not any(isinstance(t, dict) and t.get("role") == "system" for t in turns):
        own["messages"] = [{"role": "system", "content": own.pop("system")}, *turns]


def _own_turn(turn: Any, errors: list[str]) -> Any:
    """A turn as role and content; from and value are ShareGPT's names."""
    if not isinstance(turn, dict):
        return turn
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if turn.get("tool_calls"):
        errors.append("a turn has tool_calls, which are not read; write what the model says as content")
    if isinstance(content, list):
        content = [_own_part(part, errors) for part in content]
    named = _ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": named, **({} if content is None else {"content": content})}


def _own_part(part: Any, errors: list[str]) -> Any:
    """A part of a turn with the file name under its kind; without a file, a placeholder for one of the sample's."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        return part
    declared = part.get("type")
    if declared is None:  # {"image": "a.jpg"}
        kinds = [kind for kind in ("text", *MEDIA_KINDS) if kind in part]
        declared = kinds[0] if len(kinds) == 1 else None
    if not isinstance(declared, str):
        return part
    kind = declared.removeprefix("input_").removesuffix("_url")
    if kind == "text":
        return {"type": "text", "text": part.get("text")}
    if kind not in MEDIA_KINDS:
        return part
    for name in sorted(_IGNORED_LIMITS & part.keys()):
        errors.append(f"{name} of {kind} parts is not read; cut the file, or set calibration.max_pixels and video_fps")
    names = (kind, declared, "url", "path", "file")
    value = next((part[name] for name in names if part.get(name) not in (None, "")), None)
    if value is None:
        return {"type": kind} if kind not in part else part
    if isinstance(value, dict):  # {"url": ...}, {"path": ...}
        if "data" in value:
            errors.append(f"{declared} holds encoded data; write it to a file, and give its name")
            return {"type": "text", "text": f"<{kind}>"}
        value = value.get("url", value.get("path"))
    if declared.endswith("_url") or "url" in part:
        value = _local_name(value)
    return {"type": kind, kind: value}


def _local_name(url: Any) -> Any:
    """The path of a file URL; other values as they are."""
    if isinstance(url, str) and url.startswith("file://"):
        split = urlsplit(url)
        return unquote(split.path) if split.netloc in ("", "localhost") else url
    return url


# --- files ---------------------------------------------------------------------------------------------------


def _files(own: dict[str, Any]) -> dict[str, list[Any]]:
    """The files beside the turns or the text, by kind. Tables of Hugging Face have {"path": ..., "bytes": null}."""
    found = {}
    for kind in MEDIA_KINDS:
        value = own.get(kind)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        found[kind] = [v["path"] if isinstance(v, dict) and set(v) <= {"path", "bytes"} and v.get("path") else v
                       for v in listed]  # fmt: skip
    return found


def _with_files_in_turns(own: dict[str, Any], errors: list[str]) -> dict[str, Any]:
    """Put the sample's files where the turns have placeholders; without any, in front of the first question."""
    files = _files(own)
    turns = [
        {**turn, "content": list(_split_content(turn["content"], files, errors))}
        if isinstance(turn, dict) and isinstance(turn.get("content"), str | list) and turn["content"]
        else turn
        for turn in own["messages"]
    ]
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    in_front: list[dict[str, Any]] = []
    for kind in MEDIA_KINDS:
        places = [part for part in parts if isinstance(part, dict) and part == {"type": kind}]
        if not places:  # as in samples without turns
            in_front += [{"type": kind, kind: file} for file in files[kind]]
        if places and len(places) != len(files[kind]):
            listed = f"{len(files[kind])} file{'s' * (len(files[kind]) != 1)}"
            there = f"{len(places)} placeholder{'s' * (len(places) != 1)} of {kind}"
            errors.append(f"messages have {there}, and {kind} lists {listed}")
            for place in places:
                place |= {"type": "text", "text": f"<{kind}>"}
            continue
        for place, file in zip(places, files[kind], strict=False):
            place[kind] = file
    first = next((turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"), None)
    if first is not None and isinstance(first.get("content"), list):
        first["content"][:0] = in_front
    return {key: value for key, value in own.items() if key not in MEDIA_KINDS} | {"messages": turns}


def _with_files_in_text(own: dict[str, Any], errors: list[str]) -> dict[str, Any]:
    """Turns with the files where the text has placeholders; unchanged if it has none."""
    text, files = own.get("text"), _files(own)
    if not isinstance(text, str):
        return own
    parts = list(_split_content(text, files, errors))
    if all(part["type"] == "text" for part in parts):
        return own
    turns: list[dict[str, Any]] = [{"role": "user", "content": text}]
    if own.get("answer"):
        turns.append({"role": "assistant", "content": own["answer"]})
    rest = {key: value for key, value in own.items() if key not in ("text", "answer")} | {"messages": turns}
    _add_system(rest)
    return _with_files_in_turns(rest, errors)


def _split_content(content: Any, files: dict[str, list[Any]], errors: list[str]) -> Iterator[Any]:
    """The parts of a turn, with a placeholder part for each tag in its texts."""
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            yield part
            continue
        if inline := _INLINE_FILE.search(text):
            errors.append(f"text holds {inline[0][:60]!r}; write <image> or <audio>, and list the file beside it")
        pieces = _TAG.split(text)  # text, kind, text, kind, ..., text
        if len(pieces) == 1:
            yield part
            continue
        kept = ""
        for number, piece in enumerate(pieces):
            if number % 2 == 0:
                kept += piece
            elif not files[piece] and piece in _HTML_TAGS:
                kept += f"<{piece}>"
            else:
                if kept.strip():
                    yield {"type": "text", "text": kept.strip("\n")}
                kept = ""
                yield {"type": piece}
        if kept.strip():
            yield {"type": "text", "text": kept.strip("\n")}
