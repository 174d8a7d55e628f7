"""Quantize a model on a simulated NPU, and print by line how often the host waits, copies, and launches a kernel.

PYTHONPATH=.:tests python -m simulated_card.count MODEL OUT INDEX RECIPE

A process of its own, because torch has queues for the gradients of a card only if there was one when the process
computed its first gradient.
"""

from __future__ import annotations

import sys

from msmodelslim_omni import quantize

from .card import simulated_card


def main(model: str, out: str, index: str, recipe: str) -> None:
    with simulated_card("npu") as counts:
        quantize(model, out, config_path=recipe, dataset=index, device="npu")
    print(counts.table())
    in_layers = sum(count for line, count in counts.waits.items() if not line.startswith("models/"))
    print(f"waits outside of the towers and of transformers: {in_layers}")


if __name__ == "__main__":
    main(*sys.argv[1:])
