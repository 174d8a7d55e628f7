"""Lists of modules that a loader must leave float, in words that transformers 4, 5 and vLLM take the same way."""

from __future__ import annotations

from .job import OutputJob


def skip_list_entries(job: OutputJob) -> list[str]:
    """`visual`, a part of the name to one loader, and `.*visual`, a pattern from its start to another."""
    words = [pattern.removeprefix("re:").removeprefix(".*").removesuffix(".*") for pattern in job.ignore_patterns]
    return [*words, *(f".*{word}" for word in words)]
