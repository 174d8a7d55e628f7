"""Entries for the lists of modules that stay float (`modules_to_not_convert`, `llm_int8_skip_modules`)."""

from __future__ import annotations

from .job import OutputJob


def skip_list_entries(job: OutputJob) -> list[str]:
    """The entries for `job.ignore_patterns`, in forms that transformers 4, transformers 5 and vLLM all match.

    Each pattern gives two: `visual` for loaders that match a substring of the module's name, and `.*visual` for loaders
    that match a regular expression from the start of the name.
    """
    words = [pattern.removeprefix("re:").removeprefix(".*").removesuffix(".*") for pattern in job.ignore_patterns]
    names = [word.replace("\\.", ".").removesuffix("$") for word in words]
    return [*names, *(f".*{word}" for word in words)]
