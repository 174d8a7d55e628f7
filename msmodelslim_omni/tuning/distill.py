"""Fits the factors of all layers to the logits of the float model.

The loss is KL(float || quantized) of the next token over the calibration samples (distillation as in EfficientQAT's
second phase, arXiv 2407.11062, here with one factor per output channel instead of one per group: with the few thousand
tokens of a calibration set it generalizes as well, and the factors and their moments take no memory worth mentioning).
Samples that are kept out decide which epoch is taken; none, if none is better than the rounded model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..calibration import SampleEnds
from ..errors import QuantError
from ..plan import TUNED_TOKENS, QuantPlan
from ..runtime import Progress
from ..storage import is_whole, load_tensor, read_header, write_tensors
from .factors import Factors, SolvedLayer, fold_factors, neutral_factors
from .head import Head
from .walk import Chain

EPOCHS, EPOCHS_WITH_OWN_TEXTS = 4, 2  # a sample set with texts of the model itself is several times as large
LEARNING_RATE = 1e-3  # of the logarithms: about a thousandth of each factor per step, falling to zero (cosine)
_HELD_OUT_SHARE = 8  # one of so many samples, where calibration keeps none out of H
_TEXT = 0  # index into MODALITIES


@dataclass(frozen=True)
class Tuning:
    """What tuning did, for the report.

    kl: mean KL per position of the samples kept out, in nats, before tuning and after each epoch, with the tensors
    rounded as they are stored. epoch: the one that was taken; 0: the model as it was rounded. samples: tuned on.
    """

    kl: tuple[float, ...]
    epoch: int
    samples: int
    held_out: int


def refuse_effort(plan: QuantPlan, processes: int) -> None:
    """Raise QuantError where `--effort best` has nothing to do, or layers whose gradient is not available."""
    if processes > 1:
        raise QuantError("--effort best runs in one process", "start it without torchrun, or leave --effort out")
    if plan.dataset is None:
        raise QuantError("--effort best needs samples, and the recipe is data-free", "use --quant_type w4a16")
    if plan.layer_spec.experts is not None:
        raise QuantError(
            f"--effort best: {plan.model.model_type} has experts, which cannot be tuned yet", "leave --effort out"
        )
    if plan.statistics != "gram":
        raise QuantError(
            "--effort best improves weights rounded with AWQ or GPTQ, and this recipe uses neither",
            "use --quant_type w4a16 or w8a8_gptq, or leave --effort out",
        )
    if plan.tunes and plan.calibration.propagate_error:
        raise QuantError(
            "--effort best needs the float model's hidden states, but the recipe has propagate_error: True",
            "set calibration.propagate_error: False",
        )


def tune(
    plan: QuantPlan,
    samples: SampleEnds,
    solved: Callable[[int], SolvedLayer],
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> tuple[Callable[[int], SolvedLayer], Tuning]:
    """Tune all layers. Returns a reader of the tuned layers, and what was done.

    solved: reads a quantized layer. folder: keeps the state after each epoch; a stopped run goes on from there and
    gives the same bytes.
    """
    run = _Run(plan, samples, solved, folder / "tuning.safetensors", device, progress)
    factors, result = run.fit()
    return lambda index: fold_factors(solved(index), factors[index]) if result.epoch else solved(index), result


class _Run:
    """The state of a tuning: factors, the moments of Adam, the best factors so far."""

    def __init__(
        self,
        plan: QuantPlan,
        samples: SampleEnds,
        solved: Callable[[int], SolvedLayer],
        file: Path,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._plan, self._samples, self._file, self._progress = plan, samples, file, progress
        self._chain = Chain(plan, solved, samples, device)
        self._head = Head(plan, device)
        self._device = device
        given = len(samples) - samples.stems.own_texts
        self._epochs = EPOCHS_WITH_OWN_TEXTS if samples.stems.own_texts else EPOCHS
        self._held_out = sorted(samples.held_out) or list(range(_HELD_OUT_SHARE - 1, given, _HELD_OUT_SHARE))
        kept_out = set(self._held_out)
        self._training = [n for n in range(len(samples)) if n not in kept_out and len(self._positions(n))]
        self._held_out = [n for n in self._held_out if len(self._positions(n))]
        if not self._training or not self._held_out:
            raise QuantError(
                f"--effort best: {given} samples are too few to tune on some and to judge on others",
                f"give at least {_HELD_OUT_SHARE} samples with text",
            )
        spec = plan.layer_spec
        self.factors = [neutral_factors(solved(n), spec, device) for n in range(len(plan.layers))]
        self._leaves = [tensor.requires_grad_() for _, tensor in _named(self.factors)]
        self._optimizer = torch.optim.Adam(self._leaves, lr=LEARNING_RATE, betas=(0.9, 0.95))
        self._best = [factors.copied() for factors in self.factors]
        self._kl: list[float] = []

    def fit(self) -> tuple[list[Factors], Tuning]:
        """Run the epochs that are left. Returns the best factors."""
        self._resume()
        if not self._kl:
            self._kl.append(self._judge())
        for epoch in range(len(self._kl), self._epochs + 1):
            self._train(epoch)
            self._kl.append(self._judge())
            if self._kl[-1] == min(self._kl):
                self._best = [factors.copied() for factors in self.factors]
            self._save()
        taken = self._kl.index(min(self._kl))
        return self._best, Tuning(tuple(self._kl), taken, len(self._training), len(self._held_out))

    # --- one epoch ---

    def _train(self, epoch: int) -> None:
        order = torch.randperm(len(self._training), generator=torch.Generator().manual_seed(epoch)).tolist()
        batches = list(self._batches([self._training[n] for n in order]))
        for number, batch in enumerate(batches):
            self._progress.step(f"tuning, epoch {epoch} of {self._epochs}", number, len(batches), self._detail())
            part = (epoch - 1 + number / len(batches)) / self._epochs
            self._optimizer.param_groups[0]["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * part))
            self._optimizer.zero_grad()
            boundaries = self._chain.forward(batch, self.factors)
            _, gradients = self._loss(batch, boundaries[-1], gradient=True)
            self._chain.backward(batch, boundaries, gradients, self.factors)
            self._optimizer.step()
        self._progress.step(f"tuning, epoch {epoch} of {self._epochs}", len(batches), len(batches), self._detail())

    def _judge(self) -> float:
        """Mean KL of the samples kept out, with every tensor rounded as it is stored."""
        rounded = Chain(
            self._plan,
            lambda n: fold_factors(self._chain.solved(n), self.factors[n].copied()),
            self._samples,
            self._device,
        )
        total = positions = 0.0
        for batch in self._batches(self._held_out):
            loss, _ = self._loss(batch, rounded.forward(batch, None)[-1], gradient=False)
            count = sum(len(self._positions(n)) for n in batch)
            total, positions = total + loss * count, positions + count
        return total / positions

    def _loss(
        self, batch: Sequence[int], measured: list[torch.Tensor], *, gradient: bool
    ) -> tuple[float, list[torch.Tensor]]:
        """The mean loss over the positions of a batch, and its gradient at each sample's last boundary."""
        count = sum(len(self._positions(n)) for n in batch)
        total, gradients = 0.0, []
        for position, hidden in zip(batch, measured, strict=True):
            chosen = self._positions(position).to(self._device)
            exact = self._samples.last(position).to(self._device)
            loss, grad = self._head.loss(exact[0][chosen], hidden[0][chosen], gradient=gradient)
            total += loss
            gradients.append(torch.zeros_like(hidden).index_copy_(1, chosen, grad[None] / count))
        return total / count, gradients

    def _positions(self, sample: int) -> torch.Tensor:
        """The positions that predict text; a model's logits mean nothing where an image or a sound goes on."""
        modality = self._samples.modality(sample)
        return (modality[1:] == _TEXT).nonzero().flatten()

    def _batches(self, positions: Sequence[int]) -> Iterator[list[int]]:
        """Consecutive samples of at least TUNED_TOKENS tokens together; the last batch may be smaller."""
        batch: list[int] = []
        tokens = 0
        for position in positions:
            batch.append(position)
            tokens += len(self._samples.modality(position))
            if tokens >= TUNED_TOKENS:
                yield batch
                batch, tokens = [], 0
        if batch:
            yield batch

    def _detail(self) -> str:
        return f"KL {self._kl[0]:.4g} before, {min(self._kl):.4g} now"

    # --- the state on disk ---

    def _save(self) -> None:
        tensors = {"kl": torch.tensor(self._kl, dtype=torch.float64)}
        for (name, leaf), (_, best) in zip(_named(self.factors), _named(self._best), strict=True):
            moments = self._optimizer.state[leaf]
            tensors |= {f"now.{name}": leaf.detach(), f"best.{name}": best}
            tensors |= {f"first.{name}": moments["exp_avg"], f"second.{name}": moments["exp_avg_sq"]}
            tensors["step"] = moments["step"].to(torch.float32).reshape(1)
        write_tensors(self._file, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, checksum=True)

    def _resume(self) -> None:
        if not is_whole(self._file):
            return
        stored = {name: load_tensor(info) for name, info in read_header(self._file).items()}
        self._kl = stored["kl"].tolist()
        for (name, leaf), (_, best) in zip(_named(self.factors), _named(self._best), strict=True):
            with torch.no_grad():
                leaf.copy_(stored[f"now.{name}"])
                best.copy_(stored[f"best.{name}"])
            self._optimizer.state[leaf] = {
                "step": stored["step"].reshape(()).clone(),  # Adam counts in place, for each leaf
                "exp_avg": stored[f"first.{name}"].to(self._device),
                "exp_avg_sq": stored[f"second.{name}"].to(self._device),
            }


def _named(factors: Sequence[Factors]) -> list[tuple[str, torch.Tensor]]:
    return [(f"{index}.{name}", tensor) for index, layer in enumerate(factors) for name, tensor in layer.named()]
