"""The verdict per runtime: the table of compatibility, and the errors of the examination that concern the runtime."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..compatibility import RUNTIMES, Loads, loads_in
from ..errors import QuantError
from ..formats import FORMATS
from ..models import ModelSpec
from .codes import ASCEND, TF4, TF5, VLLM
from .findings import Finding
from .headers import Folder

# Runtime of the table -> the name under which findings list it.
_NAMES = {
    "vllm": VLLM,
    "vllm_cpu": VLLM,
    "vllm_ascend": ASCEND,
    "transformers_4": TF4,
    "transformers_5": TF5,
}
# Format as doctor calls it -> saver.
SAVERS = {form.quant_method or "ascend": saver for saver, form in FORMATS.items()}


def verdicts(
    model: ModelSpec | None, declared: str, settings: Any, folder: Folder, findings: Collection[Finding], stopped: str
) -> dict[str, Loads]:
    """Whether each runtime of the table loads the checkpoint, how, and by which proof.

    declared: the declared format. settings: the quantization_config, or the description. stopped: why the examination
    ended early, or an empty string.
    """
    if stopped:
        loads = dict.fromkeys(RUNTIMES, Loads("no", "not run", stopped))
    elif model is None:
        loads = dict.fromkeys(RUNTIMES, Loads("unknown", "not run", "this tool does not know the model"))
    elif not declared or declared not in SAVERS:
        loads = dict.fromkeys(RUNTIMES, Loads("unknown", "not run", "no known format is declared"))
    else:
        saver = SAVERS[declared]
        names = _scheme_names(saver, settings, folder)
        silent = bool(model.speech_prefixes) and not any(n.startswith(model.speech_prefixes) for n in folder.tensors)
        loads = loads_in(model.hf_model_type, saver, names, without_speech=silent)
    return {runtime: _with_errors(runtime, found, findings) for runtime, found in loads.items()}


def _scheme_names(saver: str, settings: Any, folder: Folder) -> set[str]:
    """Names of the schemes of the stored Linears, as the format's own reader finds them; empty if it cannot."""
    if not isinstance(settings, Mapping):
        return set()
    try:
        stored = FORMATS[saver].read_linears(dict(settings), folder.tensors, lambda name: "BF16")
    except (QuantError, TypeError, ValueError, KeyError, AttributeError):  # damaged settings may raise anything
        return set()
    return {linear.linear.scheme.name for linear in stored.linears.values()}


def _with_errors(runtime: str, loads: Loads, findings: Iterable[Finding]) -> Loads:
    codes = {f.code for f in findings if f.level == "error" and _NAMES[runtime] in f.runtimes}
    if not codes or loads.verdict == "no":
        return loads
    return Loads("no", "emulated", f"because of {', '.join(sorted(codes))} above")
