"""Texts that the float model itself writes: more calibration samples for `--effort best` where tokens are few.

With a few thousand tokens of one kind of text, scales, roundings and tuning fit that kind. What a model writes unasked
is near to what it was trained on, and needs no data (self-calibration, arXiv 2410.17170; LLM-QAT, arXiv 2305.17888).
Each text answers an empty question; its first token is drawn evenly from all tokens of text, so that texts differ, and
each further one from the model's own probabilities at temperature 1.

All texts are written together, one layer in memory at a time unless several fit, with keys and values in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..calibration import CalibSample, Stems, open_processor, prepare_sample, run_stem, with_system
from ..models import LayerInput, ModelInputs, can_join, cut_arguments, pass_cache_through
from ..plan import QuantPlan, own_text_length, own_texts, room_for_layers
from ..runtime import Progress, free_modules
from ..storage import load_tensor, row_range
from .factors import SolvedLayer
from .head import Head
from .walk import build_module


def add_own_texts(plan: QuantPlan, stems: Stems, first: int, device: torch.device, progress: Progress) -> Stems:
    """The samples, and behind them as many texts of the model itself as `plan.own_texts` says.

    first: the number of the first text's file, behind those of all samples, skipped ones included. Texts that an
    earlier, stopped run has written are used again.
    """
    length, count = own_text_length(plan), own_texts(sum(stems.lengths))
    modality = torch.zeros(length, dtype=torch.int8)
    store = stems.store(0)
    numbers = tuple(range(first, first + count))
    if not all(store.is_whole(number) for number in numbers):
        prompt = _open_prompt(plan, length, device)
        if prompt is None or not can_join(prompt.inputs.arguments):
            return stems  # the latter: arguments of which it is not known how to cut them to one token
        texts = _Writer(plan, prompt, count, device).write(progress)
        free_modules(device)  # the writer's layers
        for number, hidden in zip(numbers, texts, strict=True):
            store.write(number, LayerInput(hidden[None], prompt.inputs.arguments), modality)
    return replace(
        stems,
        samples=(*stems.samples, *(_empty_question(plan, f"own text {n}") for n in range(1, count + 1))),
        numbers=(*stems.numbers, *numbers),
        modalities=(*stems.modalities, *[modality] * count),
        own_texts=count,
    )


@dataclass(frozen=True)
class _Prompt:
    """The empty question in front of the first layer, continued to the length of a text.

    inputs: of that many tokens; those behind the question are fillers, whose hidden states are not used. tokens: of the
    question. allowed: bool [vocabulary], the tokens that a text may have.
    """

    inputs: LayerInput
    tokens: int
    allowed: torch.Tensor


def _empty_question(plan: QuantPlan, where: str) -> CalibSample:
    question = {"role": "user", "content": [{"type": "text", "text": ""}]}
    return CalibSample(where, tuple(with_system([question], plan.model)), False)


def _open_prompt(plan: QuantPlan, length: int, device: torch.device) -> _Prompt | None:
    processor = open_processor(plan)
    sample = _empty_question(plan, "an empty question")
    ids = prepare_sample(sample, processor).tensors["input_ids"]  # [1, tokens]
    if ids.shape[1] + 1 >= length:
        return None  # max_tokens leaves no room for a text
    filled = torch.cat([ids, ids[:, -1:].expand(1, length - ids.shape[1])], dim=1)
    tensors = {"input_ids": filled, "attention_mask": torch.ones_like(filled)}
    stem = plan.model.family.open_stem(plan.checkpoint, device, plan.budget.towers)
    inputs = run_stem(sample, ModelInputs(tensors, False, torch.zeros(length, dtype=torch.int8)), stem)
    del stem
    free_modules(device)
    lm_head = plan.checkpoint.tensors[plan.model.lm_head_tensor(plan.checkpoint.config)]
    allowed = torch.zeros(lm_head.shape[0], dtype=torch.bool)
    allowed[[token for token in processor.text_tokens() if token < len(allowed)]] = True
    return _Prompt(inputs, ids.shape[1], allowed)


class _Writer:
    """Writes all texts at once, token by token, with the library's layers in float32."""

    def __init__(self, plan: QuantPlan, prompt: _Prompt, count: int, device: torch.device) -> None:
        self._plan, self._prompt, self._device = plan, prompt, device
        self._head = Head(plan, device)
        self._allowed = prompt.allowed.to(device)
        self._generator = torch.Generator().manual_seed(plan.seed)
        length, layers = prompt.inputs.hidden.shape[1], len(plan.layers)
        self._hidden = prompt.inputs.hidden.expand(count, -1, -1).clone()  # of all texts, [count, length, hidden]
        self._caches = [_KeysAndValues(length) for _ in range(layers)]
        self._kept: dict[int, torch.nn.Module] = {}
        self._room = room_for_layers(plan)

    def write(self, progress: Progress) -> torch.Tensor:
        """The embedded tokens of all texts, float32 [count, length, hidden]."""
        count, length, _ = self._hidden.shape
        with torch.inference_mode():
            for position in range(length - 1):
                out = self._through_layers(position)
                if position == self._prompt.tokens - 1:
                    self._append(position + 1, self._allowed.expand(count, -1).to(torch.float32))
                elif position >= self._prompt.tokens:
                    self._append(position + 1, self._probabilities(out))
                progress.step("own texts", position + 1, length - 1, f"{count} texts")
        return self._hidden

    def _through_layers(self, position: int) -> torch.Tensor:
        """What the last layer returns for the tokens at a position, [count, hidden]. Extends the caches."""
        hidden = self._hidden[:, position : position + 1]
        arguments: dict[str, Any] = cut_arguments(self._prompt.inputs.arguments, position)
        for index in range(len(self._caches)):
            out = self._module(index)(hidden, **arguments)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden[:, 0]

    def _module(self, index: int) -> torch.nn.Module:
        if index in self._kept:
            return self._kept[index]
        plan = self._plan
        names = {name: plan.model.layer_name(index, name) for name in plan.layer_spec.shapes}
        floats = {name: plan.checkpoint.load_finite(full).to(self._device) for name, full in names.items()}
        module = build_module(plan, SolvedLayer(index, {}, floats, frozenset()))
        pass_cache_through(module, self._caches[index].extended)
        size = sum(parameter.nbytes for parameter in module.parameters())
        if size <= self._room:
            self._room -= size
            self._kept[index] = module
        return module

    def _probabilities(self, out: torch.Tensor) -> torch.Tensor:
        """Of the next token, [count, vocabulary]; 0 for tokens that are not of text."""
        logits = self._head.logits(out)
        return logits.masked_fill_(~self._allowed, -torch.inf).softmax(dim=1)

    def _append(self, position: int, probabilities: torch.Tensor) -> None:
        """Draw the token of each text at a position."""
        drawn = torch.multinomial(probabilities.cpu(), 1, generator=self._generator).flatten().tolist()
        embedding = self._plan.checkpoint.tensors[self._plan.model.embedding]
        rows = [load_tensor(row_range(embedding, token, token + 1)) for token in drawn]
        self._hidden[:, position] = torch.cat(rows).to(self._device, torch.float32)


class _KeysAndValues:
    """Keys and values of a layer so far, in bfloat16."""

    def __init__(self, length: int) -> None:
        self._length, self._tokens = length, 0
        self._stored: list[torch.Tensor] = []

    def extended(self, *new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values of the next token, [count, heads, 1, d] each. Returns those of all tokens."""
        if not self._stored:
            count, heads, _, size = new[0].shape
            self._stored = [new[0].new_empty((count, heads, self._length, size), dtype=torch.bfloat16) for _ in new]
        for stored, tensor in zip(self._stored, new, strict=True):
            stored[:, :, self._tokens] = tensor[:, :, 0]
        self._tokens += 1
        keys, values = (stored[:, :, : self._tokens].to(torch.float32) for stored in self._stored)
        return keys, values
