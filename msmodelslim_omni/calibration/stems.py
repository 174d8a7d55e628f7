"""From media to the first decoder layer: every sample runs through processor, towers and embedding once.

The results are files in the work folder, shared by all processes of a run. A resumed run reuses the files that are
already there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import QuantError
from ..models import MediaLimits, MediaProcessor
from ..plan import QuantPlan
from ..runtime import SINGLE_PROCESS, Extent, Progress, Team, free_modules
from .sample_store import StemStore, refuse_nonfinite_states
from .samples import CalibSample, CalibSet, describe_fault, prepare_sample, run_stem
from .token_roles import count_tokens

_LISTED_WARNINGS = 10


@dataclass(frozen=True)
class Stems:
    """The usable samples in front of the first decoder layer, in the order of the index.

    folder: holds one file per sample. numbers: the samples' numbers in that folder. modalities: int8 [tokens] per
    sample, indices into MODALITIES. warnings: one per sample that was skipped.
    own_texts: how many of the samples, at the end, the model has written itself; see tuning.own_texts.
    """

    folder: Path
    samples: tuple[CalibSample, ...]
    numbers: tuple[int, ...]
    modalities: tuple[torch.Tensor, ...]
    warnings: tuple[str, ...] = ()
    own_texts: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> list[int]:
        """Tokens per sample."""
        return [len(modality) for modality in self.modalities]

    def tokens_by_modality(self) -> dict[str, int]:
        return count_tokens(self.modalities)

    def extent(self) -> Extent:
        return Extent(sum(self.lengths), max(self.lengths), len(self.tokens_by_modality()))

    def store(self, cache_bytes: int) -> StemStore:
        """The files. cache_bytes: how much of them may stay in memory."""
        return StemStore(self.folder, cache_bytes)


def prepare_stems(
    plan: QuantPlan,
    calib: CalibSet,
    folder: Path,
    device: torch.device,
    progress: Progress,
    team: Team = SINGLE_PROCESS,
) -> Stems:
    """Run every sample of the set up to the first decoder layer, each in one process of the team.

    Raises QuantError where a sample cannot be used and the recipe says `on_bad_sample: fail`, where no sample is left,
    and where no sample is left that calibration.modality_weights counts.
    """
    store = StemStore(folder / "stem", plan.budget.arguments)
    missing = team.broadcast([number for number in range(len(calib.samples)) if not store.is_whole(number)])
    split = team.split([1.0] * len(missing))  # the lengths are not known yet
    skipped = _run_stem(plan, calib.samples, [missing[item] for item in split.local_items], store, device, progress)
    warnings = tuple(warning for warning in split.gather(skipped) if warning)
    numbers = [number for number in range(len(calib.samples)) if store.has(number)]
    if not numbers:
        raise QuantError("no calibration sample could be used:\n" + "\n".join(warnings[:_LISTED_WARNINGS]))
    stems = Stems(
        folder=folder / "stem",
        samples=tuple(calib.samples[number] for number in numbers),
        numbers=tuple(numbers),
        modalities=tuple(store.modality(number) for number in numbers),
        warnings=warnings,
    )
    _require_weighted_modality(plan, stems)
    return stems


def open_processor(plan: QuantPlan) -> MediaProcessor:
    """The library's processor, with the plan's limits for a sample."""
    limits = MediaLimits(plan.calibration.max_tokens, plan.calibration.max_pixels, plan.calibration.video_fps)
    return plan.model.family.open_media_processor(plan.checkpoint.path, limits, plan.trust_remote_code)


def _run_stem(
    plan: QuantPlan,
    samples: Sequence[CalibSample],
    numbers: Sequence[int],
    store: StemStore,
    device: torch.device,
    progress: Progress,
) -> list[str]:
    """Store the stem of each numbered sample. Returns per sample why it was skipped, or an empty string."""
    if not numbers:
        return []
    skipped = [""] * len(numbers)
    processor = open_processor(plan)
    stem = plan.model.family.open_stem(plan.checkpoint, device, plan.budget.towers)
    for done, number in enumerate(numbers):
        sample = samples[number]
        try:
            inputs = prepare_sample(sample, processor)
            reached = run_stem(sample, inputs, stem)
        except QuantError as error:
            message = describe_fault(sample, error)
            if plan.calibration.on_bad_sample == "fail":
                raise QuantError(message, error.hint) from error
            skipped[done] = f"sample skipped: {message}"
            continue
        refuse_nonfinite_states(reached.hidden, "the embedding and towers", sample.where)
        store.write(number, reached, inputs.modality)
        progress.step("towers", done + 1, len(numbers), sample.where)
    del stem
    free_modules(device)  # the towers are larger than everything that follows
    return skipped


def _require_weighted_modality(plan: QuantPlan, stems: Stems) -> None:
    """Raise QuantError if every sample of a weighted modality was skipped."""
    weights = plan.calibration.modality_weights
    if isinstance(weights, str):
        return
    weighted = [name for name, weight in weights.items() if weight > 0]
    present = stems.tokens_by_modality()
    if not set(weighted) & set(present):
        raise QuantError(
            f"calibration.modality_weights counts only {', '.join(weighted)}, and no usable sample has that modality;"
            f" the usable samples have {', '.join(present)}\n" + "\n".join(stems.warnings[:_LISTED_WARNINGS]),
            "fix the samples, or give a weight to a modality that they have",
        )
