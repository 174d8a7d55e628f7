"""Questions with short answers about a picture, a sound, a clip or a text.

A `Sample` is one medium and the questions about it, each with the name of its task. Training asks all of them in one
conversation; the held-out sets ask one. The caller passes fonts and voices, because training and the held-out sets use
different ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tiny_omni import render
from tiny_omni.render import CLIP_HEIGHT, CLIP_WIDTH, COLOURS, FRAMES, PICTURE, SHAPES, Thing, Utterance


@dataclass(frozen=True)
class Turn:
    """One question and its answer."""

    task: str
    question: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """One medium (or none) and the questions about it.

    picture: uint8 [PICTURE, PICTURE, 3]. frames: uint8 [FRAMES, CLIP_HEIGHT, CLIP_WIDTH, 3]. sound: float32 [samples],
    the medium itself or the sound track of the clip.
    """

    turns: tuple[Turn, ...]
    picture: np.ndarray | None = None
    frames: np.ndarray | None = None
    sound: np.ndarray | None = None


# ----------------------------------------------------------------------------------------------- text

_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry")
_THINGS = ("ball", "book", "coat", "cup", "hat", "key", "lamp", "ring", "shoe", "spoon")
_TEXT_COLOURS = (*COLOURS, "black", "brown")
TEXT_TASKS = ("lookup colour", "lookup owner", "sum of digits", "difference", "sum of two digits", "larger")


def is_held_out_sum(a: int, b: int) -> bool:
    """Whether training never uses this pair of two-digit numbers."""
    return (a * 31 + b * 17) % 10 == 0


def text_turn(task: str, rng: random.Random, held_out: bool) -> Turn:
    """One question of the task."""
    if task.startswith("lookup"):
        count = rng.randint(2, 4)
        facts = list(
            zip(
                rng.sample(_NAMES, count), rng.sample(_TEXT_COLOURS, count), rng.sample(_THINGS, count), strict=True
            )
        )  # fmt: skip
        told = " ".join(f"{name} has a {colour} {thing}." for name, colour, thing in facts)
        name, colour, thing = rng.choice(facts)
        if task == "lookup colour":
            return Turn(task, f"{told} What colour is the {thing}?", colour)
        return Turn(task, f"{told} Who has the {thing}?", name)
    if task == "sum of digits":
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        return Turn(task, f"What is {a} plus {b}?", str(a + b))
    if task == "difference":
        a = rng.randint(0, 19)
        b = rng.randint(0, min(a, 9))
        return Turn(task, f"What is {a} minus {b}?", str(a - b))
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if a != b and is_held_out_sum(a, b) == held_out:
            break
    if task == "larger":
        return Turn(task, f"Which is larger, {a} or {b}?", str(max(a, b)))
    return Turn(task, f"What is {a} plus {b}?", str(a + b))


def text_sample(rng: random.Random, turns: int) -> Sample:
    """A conversation of `turns` questions for training."""
    weights = (2, 1, 1, 1, 3, 1)
    tasks = rng.choices(TEXT_TASKS, weights, k=turns)
    return Sample(tuple(text_turn(task, rng, held_out=False) for task in tasks))


# ------------------------------------------------------------------------------------------- pictures


def place_name(x: float, y: float) -> str:
    """Quarter of the picture that contains a point, such as "top left"."""
    return f"{'top' if y < PICTURE / 2 else 'bottom'} {'left' if x < PICTURE / 2 else 'right'}"


def _apart(things: Sequence[Thing], x: float, y: float, size: float) -> bool:
    return all(max(abs(t.x - x), abs(t.y - y)) > 0.62 * (t.size + size) for t in things)


def random_things(rng: random.Random, count: int) -> list[Thing]:
    """`count` shapes, at most four, each at a random place in its own quarter."""
    things = []
    for quarter in rng.sample(range(4), count):
        size = rng.uniform(32, 44)
        room = PICTURE / 4 - 0.6 * size
        x, y = ((at + 0.5) * PICTURE / 2 + rng.uniform(-room, room) for at in (quarter % 2, quarter // 2))
        things.append(Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), x, y, size))
    return things


def scene_sample(rng: random.Random, count: int, most: int, places: float = 0.0) -> Sample:
    """A scene of `count` shapes and at most `most` questions about it, in random order.

    places: share of the scenes whose first question asks for a place.
    """
    things = random_things(rng, count)
    turns = [Turn("count", "How many shapes are there?", str(count))]
    colours, shapes = [t.colour for t in things], [t.shape for t in things]
    single = {
        (t.colour, t.shape) for t in things if (t.colour, t.shape) not in _twice(zip(colours, shapes, strict=True))
    }
    for thing in things:
        if shapes.count(thing.shape) == 1:
            turns.append(Turn("colour", f"What colour is the {thing.shape}?", thing.colour))
        if colours.count(thing.colour) == 1:
            turns.append(Turn("shape", f"What shape is {thing.colour}?", thing.shape))
        if (thing.colour, thing.shape) in single:
            where = place_name(thing.x, thing.y)
            turns.append(Turn("position", f"Where is the {thing.colour} {thing.shape}?", where))
    if count > 1:
        colour = rng.choice(colours)
        turns.append(Turn("count of a colour", f"How many shapes are {colour}?", str(colours.count(colour))))
        one, two = rng.sample(things, 2)
        if abs(one.x - two.x) > 14 and {(one.colour, one.shape), (two.colour, two.shape)} <= single:
            question = f"Is the {one.colour} {one.shape} left or right of the {two.colour} {two.shape}?"
            turns.append(Turn("left or right", question, "left" if one.x < two.x else "right"))
    rng.shuffle(turns)
    asked = next((turn for turn in turns if turn.task == "position"), None)
    if asked and places and rng.random() < places:
        turns.remove(asked)
        turns.insert(0, asked)
    return Sample(tuple(turns[:most]), picture=render.draw_scene(things, rng))


def _twice(items: object) -> set[object]:
    seen: set[object] = set()
    return {item for item in items if item in seen or seen.add(item)}  # type: ignore[attr-defined,func-returns-value]


def writing_sample(rng: random.Random, kind: str, fonts: Sequence[str]) -> Sample:
    """A digit, a two-digit number or a word, drawn in one of the fonts."""
    colour = rng.choice(list(COLOURS))
    if kind == "digit":
        text, question = str(rng.randint(0, 9)), "Which digit is written?"
    elif kind == "number":
        text, question = str(rng.randint(10, 99)), "Which number is written?"
    else:
        text, question = rng.choice(render.WRITTEN), "Which word is written?"
    turns = [Turn(kind, question, text), Turn("colour of writing", "What colour is the writing?", colour)]
    rng.shuffle(turns)
    return Sample(tuple(turns), picture=render.draw_text(text, colour, rng.choice(fonts), rng))


def picture_sample(rng: random.Random, fonts: Sequence[str], hard: bool, most: int = 1, places: float = 0.0) -> Sample:
    """A training picture; easy ones have one or two shapes, a digit or a word. places: see `scene_sample`."""
    if rng.random() < 0.55:
        count = rng.choices((1, 2, 3, 4), (6, 5, 4, 3) if hard else (4, 1, 0, 0))[0]
        return scene_sample(rng, count, most, places)
    return writing_sample(rng, rng.choices(("digit", "word", "number"), (3, 3, 3 if hard else 0))[0], fonts)


# ---------------------------------------------------------------------------------------------- sound

SECONDS = {1: 0.8, 2: 1.4, 3: 2.0}  # length of a sound by its number of words
CLIP_SECONDS = 2.0
NUMBER_NAMES = {1: "one word", 2: "two words", 3: "three words"}


def speech_sample(
    rng: random.Random,
    voices: Sequence[Utterance],
    count: int,
    noise_db: tuple[float, float],
    task: str = "",
    speeds: tuple[float, float] | None = None,
) -> Sample:
    """`count` words in a row by different voices. noise_db: range of the noise's level below them; speeds: `_word`."""
    parts = [_word(rng, voices, speeds) for _ in range(count)]
    sound = render.say(parts, SECONDS[count], rng.uniform(*noise_db), _numpy(rng))
    answer = " ".join(part.word for part in parts)
    return Sample((Turn(task or NUMBER_NAMES[count], "What is said?", answer),), sound=sound)


def _word(rng: random.Random, voices: Sequence[Utterance], speeds: tuple[float, float] | None) -> Utterance:
    """A random word, played at a random speed between these two."""
    word = rng.choice(voices)
    return word if speeds is None else render.at_speed(word, rng.uniform(*speeds))


def _numpy(rng: random.Random) -> np.random.Generator:
    return np.random.default_rng(rng.getrandbits(63))


# ---------------------------------------------------------------------------------------------- clips

STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def move_plan(rng: random.Random) -> tuple[Sample, list[list[Thing]]]:
    """Questions and shapes of each frame of a clip in which one shape moves and another may rest; the mover is last."""
    way = rng.choice(list(STEPS))
    dx, dy = STEPS[way]
    size = rng.uniform(50, 84)
    step = rng.uniform(30, 75) if dx else rng.uniform(20, 34)
    travel = step * (FRAMES - 1)
    margin = 0.62 * size
    low_x, high_x = margin + travel * (dx < 0), CLIP_WIDTH - margin - travel * (dx > 0)
    low_y, high_y = margin + travel * (dy < 0), CLIP_HEIGHT - margin - travel * (dy > 0)
    x, y = rng.uniform(low_x, max(low_x, high_x)), rng.uniform(low_y, max(low_y, high_y))
    (shape, other_shape), (colour, other_colour) = rng.sample(SHAPES, 2), rng.sample(list(COLOURS), 2)
    path = [Thing(shape, colour, x + dx * step * k, y + dy * step * k, size) for k in range(FRAMES)]
    still: list[Thing] = []
    if rng.random() < 0.6:
        for _ in range(20):
            other = rng.uniform(50, 84)
            ox, oy = (
                rng.uniform(0.62 * other, CLIP_WIDTH - 0.62 * other),
                rng.uniform(0.62 * other, CLIP_HEIGHT - 0.62 * other),
            )
            if _apart(path, ox, oy, other):
                still = [Thing(other_shape, other_colour, ox, oy, other)]
                break
    turns = [
        Turn("direction", "Which way does it move?", way),
        Turn("colour that moves", "What colour is the moving shape?", colour),
        Turn("shape that moves", "What shape is moving?", shape),
    ]
    if still:
        turns.append(Turn("colour that rests", "What colour is the resting shape?", other_colour))
    rng.shuffle(turns)
    return Sample(tuple(turns)), [[*still, thing] for thing in path]


def blink_plan(rng: random.Random) -> tuple[Sample, list[list[Thing]]]:
    """Questions and shapes of each frame of a clip in which one shape is visible in some frames only."""
    count = rng.randint(1, FRAMES)
    seen = set(rng.sample(range(FRAMES), count))
    size = rng.uniform(50, 100)
    x, y = rng.uniform(0.62 * size, CLIP_WIDTH - 0.62 * size), rng.uniform(0.62 * size, CLIP_HEIGHT - 0.62 * size)
    thing = Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), x, y, size)
    turns = [
        Turn("times seen", "In how many frames is the shape seen?", str(count)),
        Turn("colour that blinks", "What colour is the blinking shape?", thing.colour),
    ]
    rng.shuffle(turns)
    return Sample(tuple(turns)), [[thing] if k in seen else [] for k in range(FRAMES)]


def clip_sample(
    rng: random.Random,
    kind: str,
    voices: Sequence[Utterance] | None = None,
    speeds: tuple[float, float] | None = None,
) -> Sample:
    """A clip ("move" or "blink"); with voices, a word is said meanwhile, and the first or last question asks for it.

    speeds: see `_word`.
    """
    plan, places = move_plan(rng) if kind == "move" else blink_plan(rng)
    turns, sound = list(plan.turns), None
    if voices is not None:
        part = _word(rng, voices, speeds)
        sound = render.say([part], CLIP_SECONDS, rng.uniform(22, 35), _numpy(rng))
        turns.insert(rng.choice((0, len(turns))), Turn("word said", "Which word is said?", part.word))
    return Sample(tuple(turns), frames=render.draw_clip(places, rng), sound=sound)


# ------------------------------------------------------------------------------------------- held out


def held_out_samples(
    modality: str, rng: random.Random, voices: Sequence[Utterance], fonts: Sequence[str]
) -> list[Sample]:
    """The held-out questions of a modality: one per sample, with a fixed number per task."""
    makers: dict[str, tuple[int, Callable[[], Sample]]]
    if modality == "text":
        makers = {
            task: (count, lambda task=task: Sample((text_turn(task, rng, held_out=True),)))
            for task, count in zip(TEXT_TASKS, (40, 40, 30, 30, 50, 30), strict=True)
        }
    elif modality == "image":
        makers = {
            "colour": (40, lambda: scene_sample(rng, rng.randint(1, 3), 99)),
            "shape": (40, lambda: scene_sample(rng, rng.randint(1, 3), 99)),
            "count": (25, lambda: scene_sample(rng, rng.randint(1, 4), 99)),
            "count of a colour": (15, lambda: scene_sample(rng, rng.randint(2, 4), 99)),
            "position": (25, lambda: scene_sample(rng, rng.randint(1, 2), 99)),
            "left or right": (15, lambda: scene_sample(rng, rng.randint(2, 3), 99)),
            "digit": (50, lambda: writing_sample(rng, "digit", fonts)),
            "number": (20, lambda: writing_sample(rng, "number", fonts)),
            "word": (40, lambda: writing_sample(rng, "word", fonts)),
        }
    elif modality == "audio":
        makers = {
            "one word": (110, lambda: speech_sample(rng, voices, 1, (15, 30))),
            "two words": (60, lambda: speech_sample(rng, voices, 2, (15, 30))),
            "three words": (30, lambda: speech_sample(rng, voices, 3, (15, 30))),
            "one word in noise": (20, lambda: speech_sample(rng, voices, 1, (0, 6), "one word in noise")),
        }
    elif modality == "video":
        makers = {
            "direction": (50, lambda: clip_sample(rng, "move")),
            "colour that moves": (35, lambda: clip_sample(rng, "move")),
            "shape that moves": (35, lambda: clip_sample(rng, "move")),
            "times seen": (40, lambda: clip_sample(rng, "blink")),
            "word said": (50, lambda: clip_sample(rng, "move", voices)),
        }
    else:
        raise ValueError(modality)
    samples = []
    for task, (count, make) in makers.items():
        found = 0
        while found < count:
            sample = make()
            turn = next((turn for turn in sample.turns if turn.task == task), None)
            if turn is not None:
                samples.append(Sample((turn,), sample.picture, sample.frames, sample.sound))
                found += 1
    return samples
