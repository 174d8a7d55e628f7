"""The loss at the logits: KL(float || quantized) of the next token, and its gradient at the hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from ..plan import TUNED_POSITIONS, QuantPlan
from ..storage import TensorInfo, load_finite, load_tensor, row_range

# lm_head is read in blocks of rows.
_BLOCK_BYTES = 32 << 20


class Head:
    """The final norm and lm_head, which both models share."""

    def __init__(self, plan: QuantPlan, device: torch.device) -> None:
        config, tensors = plan.checkpoint.config, plan.checkpoint.tensors
        weight = load_finite(tensors[plan.model.norm]).to(device, torch.float32)
        self._norm: torch.nn.Module = plan.model.family.build_norm(config, weight).requires_grad_(False)
        self._head: TensorInfo = tensors[plan.model.lm_head_tensor(config)]
        self._device = device

    def loss(self, exact: torch.Tensor, measured: torch.Tensor, *, gradient: bool) -> tuple[float, torch.Tensor]:
        """Sum of KL over positions, in nats, and its gradient with respect to `measured`, [n, hidden].

        exact, measured: float32 [n, hidden], hidden states after the last layer of the float and the quantized
        model. With logits z and probabilities p = softmax(z), KL(p || q) has the gradient q - p at the logits of q.
        gradient: False leaves it zero.
        """
        total, gradients = 0.0, torch.zeros_like(measured)
        for rows in torch.split(torch.arange(len(exact), device=exact.device), TUNED_POSITIONS):
            with torch.no_grad():
                x = self._norm(exact[rows][None])[0]
            with torch.enable_grad():
                leaf = measured[rows].detach().clone().requires_grad_(gradient)
                y = self._norm(leaf[None])[0]
            with torch.no_grad():
                p, q = self._logits(x).log_softmax(dim=1), self._logits(y.detach()).log_softmax(dim=1)
                total += float((p.exp() * (p - q)).sum(dtype=torch.float32))
                if gradient:
                    at_norm = self._back(q.exp_().sub_(p.exp_()))
            if gradient:
                torch.autograd.backward(y, at_norm)
                assert leaf.grad is not None
                gradients[rows] = leaf.grad
        return total, gradients

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Of hidden states after the last layer, [n, hidden]: float32 [n, vocabulary]."""
        with torch.inference_mode():
            return self._logits(self._norm(states[None])[0])

    def divergences(self, exact: torch.Tensor, changed: Callable[[], Iterable[torch.Tensor]]) -> list[float]:
        """Sums of KL over positions, in nats, of several models that are compared with one float model.

        exact: float32 [n, hidden]. changed: yields the same for each model, and is called once for every
        TUNED_POSITIONS positions.
        """
        totals: list[float] = []
        with torch.inference_mode():
            for rows in torch.split(torch.arange(len(exact), device=exact.device), TUNED_POSITIONS):
                p = self._logits(self._norm(exact[rows][None])[0]).log_softmax(dim=1)
                weights = p.exp()
                for number, states in enumerate(changed()):
                    q = self._logits(self._norm(states[rows][None])[0]).log_softmax(dim=1)
                    kl = float(weights.mul(p - q).sum(dtype=torch.float64))
                    if number == len(totals):
                        totals.append(0.0)
                    totals[number] += max(kl, 0.0)
        return totals

    def _blocks(self) -> list[tuple[slice, TensorInfo]]:
        vocabulary, width = self._head.shape
        step = max(1, _BLOCK_BYTES // (4 * width))
        return [(slice(a, min(a + step, vocabulary)), row_range(self._head, a, a + step))
                for a in range(0, vocabulary, step)]  # fmt: skip

    def _load(self, block: TensorInfo) -> torch.Tensor:
        return load_tensor(block).to(self._device).to(torch.float32)

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """[n, vocabulary]"""
        out = torch.empty(len(states), self._head.shape[0], device=states.device)
        for columns, block in self._blocks():
            out[:, columns] = F.linear(states, self._load(block))
        return out

    def _back(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient at lm_head's input, [n, hidden], from that at the logits, [n, vocabulary]."""
        out = torch.zeros(len(gradient), self._head.shape[1], device=gradient.device)
        for columns, block in self._blocks():
            out += gradient[:, columns] @ self._load(block)
        return out
