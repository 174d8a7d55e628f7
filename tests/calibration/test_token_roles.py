"""The weight of each modality, the probe samples, and the samples held out of the second moments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msmodelslim_omni.calibration.token_roles import (
    assign_roles,
    choose_held_out,
    choose_probe_samples,
    token_importance,
)

# --- importance ----------------------------------------------------------------------------------------------


def test_token_importance() -> None:
    counts = [10, 0, 5, 85]  # text, image, audio, video
    assert token_importance("tokens", counts) == {0: 0.01, 2: 0.01, 3: 0.01}
    balanced = token_importance("balanced", counts)
    assert balanced == pytest.approx({0: 1 / 30, 2: 1 / 15, 3: 1 / 255})
    given_weights = token_importance({"text": 1.0, "audio": 3.0}, counts)
    assert given_weights == pytest.approx({0: 1 / 40, 2: 3 / 20, 3: 0.0})
    for importance in (balanced, given_weights, token_importance("tokens", counts)):
        assert sum(weight * counts[m] for m, weight in importance.items()) == pytest.approx(1.0)
    assert token_importance({"text": 7.0}, [3, 0, 0, 0]) == {0: pytest.approx(1 / 3)}


# --- probe samples -------------------------------------------------------------------------------------------


def modalities_of(*samples: dict[int, int]) -> list[torch.Tensor]:
    """The modalities of samples that are given as token counts by modality."""
    return [
        torch.tensor([m for m, count in counts.items() for _ in range(count)], dtype=torch.int8) for counts in samples
    ]


def test_probe_samples_are_few_short_and_cover_every_modality() -> None:
    text = [{0: 20 + n} for n in range(12)]
    samples = modalities_of({0: 30, 3: 900}, *text, {0: 15, 2: 80}, {0: 30, 3: 400}, {0: 15, 2: 60})
    probe = choose_probe_samples(samples)
    chosen = torch.cat([samples[i] for i in probe])
    assert {0, 2, 3} <= set(chosen.tolist())
    assert len(probe) < 6 and len(chosen) < 0.5 * sum(len(sample) for sample in samples)
    assert 14 in probe and 0 not in probe  # the shorter of two videos
    assert choose_probe_samples(samples) == probe
    shorter = choose_probe_samples(samples, typical=False)
    assert 15 in shorter and 13 not in shorter  # the shorter of two audio samples


def test_probe_judges_every_place_of_a_sequence() -> None:
    """Half of the text tokens are in samples of 20 tokens, the others in samples of 300; and one sample is endless."""
    samples = modalities_of(
        *({0: 20} for _ in range(30)), {0: 300}, {0: 300}, {0: 5000}, {0: 10, 1: 100}, {0: 10, 1: 90}
    )
    assert choose_probe_samples(samples) == {31, 33}  # the image brings text, too
    assert choose_probe_samples(samples[:30]) == {0, 1, 2, 15}  # 75 tokens, an eighth
    assert choose_probe_samples(samples, typical=False) == {0, 1, 2, 3, 4, 5, 34}


def test_shorter_samples_are_held_out_if_typical_ones_are_too_many() -> None:
    samples = modalities_of(*({0: 20} for _ in range(12)), {0: 300})
    assert choose_held_out(choose_probe_samples(samples), samples) == frozenset()
    roles = assign_roles(samples, "balanced")
    assert roles.held_out == roles.probe_samples == choose_probe_samples(samples, typical=False)
    assert sum(roles.gram_counts) == 540 - sum(len(samples[i]) for i in roles.held_out)


def test_probe_samples_stop_at_enough_tokens() -> None:
    samples = modalities_of(*({0: 100} for _ in range(50)))
    assert choose_probe_samples(samples, enough=250) == {0, 1, 25}
    assert choose_probe_samples(samples, enough=200) == {0, 25}
    assert choose_probe_samples(samples[:3]) == {1}  # with few tokens, a share of them is enough


def test_single_sample_is_the_probe_sample() -> None:
    assert choose_probe_samples(modalities_of({0: 5, 1: 9})) == {0}


@given(
    st.lists(st.dictionaries(st.integers(0, 3), st.integers(1, 400), min_size=1, max_size=4), min_size=1, max_size=12)
)
@settings(max_examples=60, deadline=None)
def test_probe_samples_cover_every_present_modality(counts: list[dict[int, int]]) -> None:
    samples = modalities_of(*counts)
    probe = choose_probe_samples(samples)
    all_tokens, probe_tokens = torch.cat(samples), torch.cat([samples[i] for i in probe])
    for modality in range(4):
        present, chosen = int((all_tokens == modality).sum()), int((probe_tokens == modality).sum())
        assert (chosen > 0) == (present > 0)
    held_out = choose_held_out(probe, samples)
    assert held_out in (probe, frozenset())
    remaining = torch.cat([torch.zeros(0, dtype=torch.int8), *(s for i, s in enumerate(samples) if i not in held_out)])
    assert set(remaining.tolist()) == set(all_tokens.tolist())  # no modality is only in held-out samples


def test_probe_samples_are_held_out_only_if_enough_tokens_remain() -> None:
    many = modalities_of(*({0: 100} for _ in range(9)))
    assert choose_held_out(frozenset({0, 1, 2}), many) == {0, 1, 2}
    assert choose_held_out(frozenset({0, 1, 2, 3}), many) == frozenset()
    one_audio = [*many, *modalities_of({0: 10, 2: 5})]
    assert choose_held_out(frozenset({0, 9}), one_audio) == frozenset()
