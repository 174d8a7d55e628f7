"""What differs between two runs, in words: the flags that a user typed, and what flags do not show.

A fingerprint holds everything that an output depends on, most of it as digests that mean nothing to a reader.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

# The flags that decide a field of the fingerprint.
_FLAGS = {
    "model_type": ("model_type",),
    "recipe process": ("quant_type", "config_path"),
    "save_format": ("save_format", "quant_type", "config_path"),
    "recipe calibration": (
        "max_samples",
        "on_bad_sample",
        "effort",
        "compute_dtype",
        "quant_type",
        "config_path",
        "dataset",
    ),
    "memory for H": ("max_memory", "quant_type", "config_path"),
    "checkpoint": ("model_path",),
    "dataset": ("dataset", "max_samples", "seed", "quant_type", "config_path"),
    "processor files": ("model_path",),
    "seed": ("seed",),
    "device": ("device",),
}
# Fields that are digests.
_CONTENTS = {
    "recipe process": "the recipe's processors (another --quant_type or --config_path, or an edited file)",
    "recipe calibration": "the recipe's calibration settings",
    "memory for H": "the memory for H that --max_memory leaves",
    "checkpoint": "the files of the checkpoint (its config, or size or time of a shard)",
    "dataset": "the samples or media files of the dataset",
    "processor files": "the tokenizer or processor files of the checkpoint",
}


def differences(
    old: Mapping[str, str], new: Mapping[str, str], old_flags: Mapping[str, str], new_flags: Mapping[str, str]
) -> str:
    """`--quant_type was w4a16, is w8a8; torch was 2.12.0, is 2.13.0`: why the runs would give different results.

    old, new: the fingerprints. Each flag is named once; a field is named by itself if no flag explains its difference.
    """
    parts: dict[str, None] = {}
    for field in {**old, **new}:
        if old.get(field) == new.get(field):
            continue
        changed = [flag for flag in _FLAGS.get(field, ()) if old_flags.get(flag) != new_flags.get(flag)]
        if changed:
            for flag in changed:
                parts[f"--{flag} was {old_flags.get(flag, 'not given')}, is {new_flags.get(flag, 'not given')}"] = None
        elif field in _CONTENTS:
            parts[f"{_CONTENTS[field]} changed"] = None
        else:
            parts[f"{field} was {old.get(field, 'none')}, is {new.get(field, 'none')}"] = None
    return "; ".join(parts)


def command_of(flags: Mapping[str, str], save_path: str) -> str:
    """The command line of a run with these flags; empty if the flags are unknown."""
    if "model_path" not in flags:
        return ""
    words = ["msmodelslim", "quant", flags["model_path"], save_path]
    for name, value in flags.items():
        if name == "trust_remote_code":
            words += ["--trust_remote_code", "True"]
        elif name != "model_path":
            words += [f"--{name}", value]
    return shlex.join(words)
