"""Write the held-out sets and the calibration set: `python examples/tiny_omni/heldout.py MODEL [--out FOLDER]`.

Both are folders with an index.jsonl in the format of `msmodelslim quant`. heldout/ uses seeds, voices, fonts and
chapters that training does not use. calib/ has samples of the kinds that training uses, from another seed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from PIL import Image
from tiny_omni import model as omni
from tiny_omni import render, tasks, text
from tiny_omni.train import VOICES_PER_WORD, voices

MODALITIES = ("text", "image", "audio", "video")
HELD_VOICES_PER_WORD = 12
HELD_PROSE, CALIB_PROSE = 48, 20
LONGEST_PROSE = 440  # tokens; training has no longer texts


def write_sample(folder: Path, name: str, sample: tasks.Sample, modality: str) -> dict[str, Any]:
    """Write the sample's medium into the folder and return the sample's line of the index."""
    turn = sample.turns[0]
    entry: dict[str, Any] = {"text": turn.question, "answer": turn.answer, "task": turn.task, "modality": modality}
    if sample.picture is not None:
        entry["image"] = f"{name}.png"
        Image.fromarray(sample.picture).save(folder / entry["image"], optimize=True)
    elif sample.frames is not None:
        entry["video"] = f"{name}.mp4" if sample.sound is None else f"{name}.mkv"
        render.write_clip(folder / entry["video"], sample.frames, sample.sound)
        entry["use_audio_in_video"] = sample.sound is not None
    elif sample.sound is not None:
        entry["audio"] = f"{name}.flac"
        render.write_sound(folder / entry["audio"], sample.sound)
    return entry


def write_index(folder: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Write index.jsonl."""
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    (folder / "index.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def prose_pieces(tokens: omni.Tokens, chapters: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """`count` pieces of complete sentences, each 300 to LONGEST_PROSE tokens long."""
    pieces = []
    for chapter in chapters:
        piece = ""
        for sentence in chapter.replace(". ", ".\n").split("\n"):
            longer = f"{piece} {sentence}".strip()
            if len(tokens.encode(longer)) > LONGEST_PROSE:
                pieces.append(piece)
                longer = sentence
            piece = longer
    long_pieces = [piece for piece in pieces if 300 <= len(tokens.encode(piece)) <= LONGEST_PROSE]
    return [long_pieces[at] for at in sorted(rng.sample(range(len(long_pieces)), count))]


def write_held_out(out: Path, tokens: omni.Tokens, spoken: Sequence[render.Utterance], seed: int) -> None:
    """Write heldout/{text,image,audio,video,prose}/index.jsonl, and heldout/index.jsonl with all samples."""
    everything = []
    for modality in MODALITIES:
        folder = out / modality
        folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(f"{seed} held out {modality}")
        samples = tasks.held_out_samples(modality, rng, spoken, render.HELD_FONTS)
        entries = [write_sample(folder, f"{n:03d}", sample, modality) for n, sample in enumerate(samples)]
        write_index(folder, entries)
        everything += [
            {
                key: f"{modality}/{value}" if key in ("image", "audio", "video") else value
                for key, value in entry.items()
            }
            for entry in entries
        ]
    folder = out / "prose"
    folder.mkdir(exist_ok=True)
    pieces = prose_pieces(tokens, text.held_chapters(), HELD_PROSE, random.Random(f"{seed} held out prose"))
    entries = [{"text": piece, "task": "prose", "modality": "prose"} for piece in pieces]
    write_index(folder, entries)
    write_index(out, [*everything, *entries])


def write_calibration(out: Path, tokens: omni.Tokens, spoken: Sequence[render.Utterance], seed: int) -> None:
    """Write calib/index.jsonl: 128 samples of the kinds that training uses."""
    rng = random.Random(f"{seed} calibration")
    samples = [("text", tasks.Sample((tasks.text_turn(rng.choice(tasks.TEXT_TASKS), rng, False),))) for _ in range(16)]
    samples += [("image", tasks.picture_sample(rng, render.TRAIN_FONTS, True)) for _ in range(36)]
    samples += [("audio", tasks.speech_sample(rng, spoken, rng.randint(1, 3), (5, 30))) for _ in range(28)]
    samples += [("video", tasks.clip_sample(rng, "move" if n % 3 else "blink")) for n in range(20)]
    samples += [("video", tasks.clip_sample(rng, "move", spoken)) for _ in range(8)]
    out.mkdir(parents=True, exist_ok=True)
    entries = [write_sample(out, f"{n:03d}", sample, modality) for n, (modality, sample) in enumerate(samples)]
    pieces = prose_pieces(tokens, text.train_chapters(), CALIB_PROSE, rng)
    write_index(out, [*entries, *({"text": piece, "task": "prose", "modality": "prose"} for piece in pieces)])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write heldout/ and calib/ of the tiny Omni.")
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint folder with tokenizer.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for heldout/ and calib/")
    parser.add_argument("--work", type=Path, default=Path("tiny_omni.work"), help="folder for the cached voices")
    args = parser.parse_args()
    tokens = omni.Tokens(args.model)
    held = voices(args.work, True, HELD_VOICES_PER_WORD, seed=1)
    write_held_out(args.out / "heldout", tokens, held, seed=1)
    write_calibration(args.out / "calib", tokens, voices(args.work, False, VOICES_PER_WORD, seed=0), seed=2)
    for name in ("heldout", "calib"):
        files = [file for file in (args.out / name).rglob("*") if file.is_file()]
        print(f"{name}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
