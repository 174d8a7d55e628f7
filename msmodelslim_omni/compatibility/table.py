"""The table of compatibility, as data: which runtime loads which output, how, and how that is known.

The model card, doctor's verdict, the last lines of a run and the table in the documentation are made from it. To extend
it, add an Entry: a family is the model_type of config.json, a format is a saver, a scheme is a key of SCHEMES. A
combination without an entry is unknown, and every text that is made from the table says so.

Source of `run`: tests/clients/run.py, with tiny models of the same classes. Source of `emulated`: the loaders' rules
for names, shapes and config, in doctor/names.py and tests/doctor/.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["yes", "no", "unknown"]
Proof = Literal["run", "loaded", "emulated", "not run"]

# What each proof means, for the reader of the table.
PROOFS: dict[Proof, str] = {
    "run": "a tiny model of the same classes was loaded and its answers compared with the dequantized weights",
    "loaded": "a tiny model of the same classes was loaded; its answers were not compared",
    "emulated": "the loader's rules for names, shapes and config are tested; the runtime was not started",
    "not run": "nothing was tried",
}

# Runtime -> the name that tables show.
RUNTIMES: dict[str, str] = {
    "vllm": "vLLM, NVIDIA cards",
    "vllm_cpu": "vLLM 0.32.0, CPU build",
    "vllm_ascend": "vLLM-Ascend",
    "transformers_4": "transformers 4.57.3",
    "transformers_5": "transformers 5.23.0",
}

# Kind of scheme -> the name that tables show.
SCHEMES: dict[str, str] = {
    "w8a8": "W8A8 dynamic",
    "w4a16": "W4A16, zero points",
    "w4a16_sym": "W4A16 symmetric",
    "w4a16_sym+w8a8": "W8A8 dynamic and W4A16 symmetric, mixed",
    "w8a16": "W8A16",
    "w8a16+w8a8": "W8A8 dynamic and W8A16, mixed",
    "w4a8+w8a8": "W4A8 dynamic (experts) and W8A8 dynamic, mixed",
    "fp8": "FP8 dynamic",
    "fp8_block": "FP8 in blocks",
    "nvfp4a16": "NVFP4A16",
    "nvfp4": "NVFP4",
    "nf4": "NF4",
}

# Pattern of a scheme's name -> its kind.
_KINDS = {
    r"W8A8_DYNAMIC": "w8a8",
    r"W4A16(_G\d+)?": "w4a16",
    r"W4A16(_G\d+)?_SYM": "w4a16_sym",
    r"W8A16": "w8a16",
    r"W4A8_DYNAMIC": "w4a8",
    r"FP8_BLOCK": "fp8_block",
    r"FP8(_DYNAMIC)?": "fp8",
    r"NVFP4A16": "nvfp4a16",
    r"NVFP4": "nvfp4",
    r"NF4_G\d+(_DOUBLE)?": "nf4",
}

OMNI, VL, VL3, OMNI3 = "qwen2_5_omni", "qwen2_5_vl", "qwen3_vl", "qwen3_omni_moe"
FAMILIES: dict[str, str] = {
    OMNI: "Qwen2.5-Omni-7B, -3B",
    VL: "Qwen2.5-VL-7B-, -3B-Instruct",
    VL3: "Qwen3-VL, dense",
    OMNI3: "Qwen3-Omni-30B-A3B",
}

# How a class of transformers loads the checkpoint. `plain`: from_pretrained(path). `dequantized`: the weights must be
# dequantized at load. Empty: it does not load, or the model has no such class.
ClassUse = Literal["", "plain", "dequantized"]


@dataclass(frozen=True)
class Loads:
    """Whether a runtime loads an output.

    how: what it needs, or why it does not load. answering, speaking: for transformers, the use of the class that
    answers in text, and of the class that also speaks. packages: to install besides transformers.
    """

    verdict: Verdict
    proof: Proof
    how: str
    answering: ClassUse = ""
    speaking: ClassUse = ""
    packages: tuple[str, ...] = ()


UNKNOWN = Loads("unknown", "not run", "not in the table of compatibility")


@dataclass(frozen=True)
class Entry:
    """One line of the table: an output of a family in a format and scheme, and what loads it, by runtime."""

    family: str
    format: str
    scheme: str
    loads: dict[str, Loads]


# --- the facts that several entries share --------------------------------------------------------------------


def _no(how: str) -> Loads:
    return Loads("no", "not run", how)


_CT = ("compressed-tensors", "accelerate")
_BNB = ("bitsandbytes", "accelerate")

_ONLY_ASCEND = "reads no quant_model_description.json"
_NO_DENSE_W4A16 = "has W4A16 for experts of mixture models only"
_ZERO_POINTS = "compressed-tensors does not unpack zero points there"

# The processor of the tests has neither VNNI nor AVX512.
_CPU_INT8 = "right on a processor with VNNI only; without it, the test replaced vLLM's int8 product"
_CPU_INT4 = "has 4-bit products for processors with AVX512 only; without it, the test replaced them"


def _vllm(method: str, on_cpu: str) -> dict[str, Loads]:
    return {"vllm": Loads("yes", "emulated", method), "vllm_cpu": Loads("yes", "run", on_cpu)}


_ASCEND_CT = Loads("unknown", "not run", "reads int8 of compressed-tensors; neither run nor emulated with these files")
_ASCEND_ONLY = {
    "vllm": _no(_ONLY_ASCEND),
    "vllm_cpu": _no(_ONLY_ASCEND),
    "vllm_ascend": Loads("yes", "emulated", "--quantization ascend"),
    "transformers_4": _no(_ONLY_ASCEND),
    "transformers_5": _no(_ONLY_ASCEND),
}
_AWQ = {
    **_vllm("method awq or awq_marlin", _CPU_INT4),
    "vllm_ascend": _no("reads no awq"),
    "transformers_4": _no("needs autoawq, whose last version does not import beside transformers 4.57"),
    "transformers_5": Loads("unknown", "not run", "needs gptqmodel 7.7 and torch 2.14.1 or newer"),
}
_NF4 = {
    "vllm": _no("has no method for bitsandbytes"),
    "vllm_cpu": _no("has no method for bitsandbytes"),
    "vllm_ascend": _no("reads no bitsandbytes"),
}


def _unknown(how: str) -> Loads:
    return Loads("unknown", "not run", how)


_INT8_FLOAT = ("w8a16", "w8a16+w8a8")  # some or all Linears with float activations
_FLOAT_SCHEMES = ("fp8", "fp8_block", "nvfp4a16", "nvfp4")
_NO_FLOAT8 = {"vllm_ascend": _no("computes in no FP8 on A2 and A3")}
_LAYOUT_NOT_RUN = _unknown("reads this layout by its sources; neither run nor emulated with these files")
_FAMILY_NOT_RUN = _unknown("this family was not run")


def _transformers(
    how: str, answering: ClassUse, speaking: ClassUse = "", packages: tuple[str, ...] = _CT, proof: Proof = "run"
) -> Loads:
    return Loads("yes", proof, how, answering, speaking, packages)


_UNCOMPRESSED_RUN = _transformers(
    "compressed-tensors 0.20.0; dequantized when loaded, activations stay float", "dequantized"
)

_OMNI_IN_4 = {
    "w8a16": _transformers("compressed-tensors 0.20.0", "dequantized"),
    "nvfp4a16": _unknown("fails in float32 (Float and BFloat16); not compared in bfloat16"),
    "nvfp4": _unknown("fails in float32 (Float and BFloat16); not compared in bfloat16"),
    "fp8": _transformers("compressed-tensors 0.20.0, which rounds the activations to FP8", "dequantized"),
}

_LAYOUT_LOADED = Loads("yes", "emulated", "vLLM's own loader read a tiny model in the CPU build")
_ON_CPU: dict[str, Loads] = {
    "w8a16": _no("has no product of 8-bit weights and float activations"),
    "w8a16+w8a8": _no("has no product of 8-bit weights and float activations"),
    "nvfp4a16": _no("has NVFP4 products for cards only"),
    "nvfp4": _no("has NVFP4 products for cards only"),
}

_OMNI_CPU = {"fp8": Loads("yes", "run", "FP8 per channel, with activations rounded per token")}
_OMNI_LOADED = ((OMNI, "fp8"), (OMNI, "w8a16"))

# Qwen3: what was run, by family and scheme; where nothing is said, the family was not run.
_CPU_EXPERTS_INT8 = "needs AMX for experts; without it, the test replaced their product"
_CPU_EXPERTS_INT4 = "has no product for experts in groups of 32; with a replaced one the answers were right"
_QWEN3_CPU: dict[tuple[str, str, str], Loads] = {
    (VL3, "compressed_tensors", "w8a8"): Loads("yes", "run", _CPU_INT8),
    (VL3, "compressed_tensors", "w4a16_sym"): Loads("yes", "run", _CPU_INT4),
    (VL3, "awq", "w4a16"): Loads("yes", "run", _CPU_INT4),
    (OMNI3, "awq", "w4a16"): Loads("yes", "run", _CPU_EXPERTS_INT8),
    (OMNI3, "compressed_tensors", "w8a8"): Loads("yes", "loaded", _CPU_EXPERTS_INT8),
    (OMNI3, "compressed_tensors", "w4a16_sym"): _no(_CPU_EXPERTS_INT4),
}


def _of_family(family: str, output_format: str, scheme: str, known: dict[str, Loads]) -> dict[str, Loads]:
    """The loads of a Qwen3 family: those of the format, except where the family was not run."""
    loads = {runtime: entry if entry.verdict == "no" else _FAMILY_NOT_RUN for runtime, entry in known.items()}
    if output_format == "compressed_tensors" and scheme in _ON_CPU:
        loads["vllm_cpu"] = _ON_CPU[scheme]
    run = _QWEN3_CPU.get((family, output_format, scheme))
    return loads if run is None else loads | {"vllm": _LAYOUT_LOADED, "vllm_cpu": run}


# --- the table -----------------------------------------------------------------------------------------------

TABLE: tuple[Entry, ...] = (
    Entry(OMNI, "ascendv1_saver", "w8a8", _ASCEND_ONLY),
    Entry(
        OMNI,
        "compressed_tensors",
        "w8a8",
        {
            **_vllm("method compressed-tensors", _CPU_INT8),
            "vllm_ascend": _ASCEND_CT,
            "transformers_4": _transformers("compressed-tensors 0.12.2 or 0.20.0", "plain", "dequantized"),
            "transformers_5": _transformers("compressed-tensors 0.20.0", "plain", "dequantized"),
        },
    ),
    Entry(OMNI, "awq", "w4a16", _AWQ),
    Entry(
        OMNI,
        "compressed_tensors",
        "w4a16",
        {
            **_vllm("method compressed-tensors", _CPU_INT4),
            "vllm_ascend": _no(_NO_DENSE_W4A16),
            "transformers_4": _no(_ZERO_POINTS),
            "transformers_5": _transformers("dequantized when loaded", "dequantized", "dequantized"),
        },
    ),
    Entry(
        OMNI,
        "compressed_tensors",
        "w4a16_sym",
        {
            **_vllm("method compressed-tensors", _CPU_INT4),
            "vllm_ascend": _no(_NO_DENSE_W4A16),
            "transformers_4": _transformers("compressed-tensors 0.12.2 or 0.20.0", "plain", "dequantized"),
            "transformers_5": _transformers("compressed-tensors 0.20.0", "plain", "dequantized"),
        },
    ),
    Entry(
        OMNI,
        "compressed_tensors",
        "w4a16_sym+w8a8",
        {
            **_vllm("method compressed-tensors", f"{_CPU_INT8}; {_CPU_INT4}"),
            "vllm_ascend": _no(_NO_DENSE_W4A16),
            "transformers_4": _transformers("compressed-tensors 0.20.0", "plain", "dequantized"),
            "transformers_5": _transformers("compressed-tensors 0.20.0, text answers only", "plain"),
        },
    ),
    Entry(
        OMNI,
        "bitsandbytes",
        "nf4",
        {
            **_NF4,
            "transformers_4": _transformers("bitsandbytes 0.50.2", "plain", "plain", _BNB),
            "transformers_5": _transformers("bitsandbytes 0.50.2", "plain", "plain", _BNB),
        },
    ),
    Entry(VL, "ascendv1_saver", "w8a8", _ASCEND_ONLY),
    Entry(
        VL,
        "compressed_tensors",
        "w8a8",
        {
            **_vllm("method compressed-tensors", _CPU_INT8),
            "vllm_ascend": _ASCEND_CT,
            "transformers_4": _transformers("compressed-tensors 0.12.2 or 0.20.0", "plain"),
            "transformers_5": _transformers("compressed-tensors 0.20.0", "plain"),
        },
    ),
    Entry(VL, "awq", "w4a16", _AWQ),
    Entry(
        VL,
        "compressed_tensors",
        "w4a16",
        {
            **_vllm("method compressed-tensors", _CPU_INT4),
            "vllm_ascend": _no(_NO_DENSE_W4A16),
            "transformers_4": _no(_ZERO_POINTS),
            "transformers_5": _transformers("dequantized when loaded", "dequantized"),
        },
    ),
    Entry(
        VL,
        "compressed_tensors",
        "w4a16_sym",
        {
            **_vllm("method compressed-tensors", _CPU_INT4),
            "vllm_ascend": _no(_NO_DENSE_W4A16),
            "transformers_4": _transformers("compressed-tensors 0.12.2 or 0.20.0", "plain"),
            "transformers_5": _transformers("compressed-tensors 0.20.0", "plain"),
        },
    ),
    Entry(
        VL,
        "bitsandbytes",
        "nf4",
        {
            **_NF4,
            "transformers_4": _transformers("bitsandbytes 0.50.2", "plain", packages=_BNB),
            "transformers_5": _transformers("bitsandbytes 0.50.2", "plain", packages=_BNB),
        },
    ),
    *(
        Entry(
            family,
            "compressed_tensors",
            scheme,
            {
                "vllm": _LAYOUT_LOADED if (family, scheme) in _OMNI_LOADED else _LAYOUT_NOT_RUN,
                "vllm_cpu": (_OMNI_CPU if family == OMNI else {}).get(scheme, _ON_CPU.get(scheme, _LAYOUT_NOT_RUN)),
                **({"vllm_ascend": _LAYOUT_NOT_RUN} if scheme in _INT8_FLOAT else _NO_FLOAT8),
                "transformers_4": (_OMNI_IN_4 if family == OMNI else {}).get(scheme, _LAYOUT_NOT_RUN),
                "transformers_5": _LAYOUT_NOT_RUN if family != OMNI or scheme == "w8a16+w8a8" else _UNCOMPRESSED_RUN,
            },
        )
        for family in (OMNI, VL)
        for scheme in (*_INT8_FLOAT, *_FLOAT_SCHEMES)
    ),
    *(Entry(family, "ascendv1_saver", scheme, _ASCEND_ONLY) for family in (OMNI, VL) for scheme in _INT8_FLOAT),
    Entry(OMNI3, "ascendv1_saver", "w4a8+w8a8", _ASCEND_ONLY | {"vllm_ascend": _FAMILY_NOT_RUN}),
    Entry(OMNI3, "ascendv1_saver", "w8a16", _ASCEND_ONLY | {"vllm_ascend": _no("has W8A16 for dense Linears only")}),
    *(
        Entry(
            family,
            output_format,
            scheme,
            _of_family(family, output_format, scheme, known),
        )
        for family in (VL3, OMNI3)
        for output_format, scheme, known in (
            ("ascendv1_saver", "w8a8", _ASCEND_ONLY),
            *(("ascendv1_saver", scheme, _ASCEND_ONLY) for scheme in _INT8_FLOAT),
            ("compressed_tensors", "w8a8", dict.fromkeys(RUNTIMES, _FAMILY_NOT_RUN)),
            ("awq", "w4a16", _AWQ),
            ("compressed_tensors", "w4a16", dict.fromkeys(RUNTIMES, _FAMILY_NOT_RUN)),
            ("compressed_tensors", "w4a16_sym", dict.fromkeys(RUNTIMES, _FAMILY_NOT_RUN)),
            ("bitsandbytes", "nf4", dict.fromkeys(RUNTIMES, _FAMILY_NOT_RUN) | _NF4),
            *(("compressed_tensors", scheme, dict.fromkeys(RUNTIMES, _FAMILY_NOT_RUN)) for scheme in _INT8_FLOAT),
            *(("compressed_tensors", f, dict.fromkeys(RUNTIMES, _FAMILY_NOT_RUN) | _NO_FLOAT8) for f in _FLOAT_SCHEMES),
        )
        if (family, scheme) not in ((OMNI3, "nf4"), (OMNI3, "w8a16+w8a8"))
        and (family, output_format, scheme) != (OMNI3, "ascendv1_saver", "w8a16")
    ),
)


# --- looking up ----------------------------------------------------------------------------------------------


def kind_of_schemes(names: Iterable[str]) -> str:
    """The kind of scheme of an output, from the names of its Linears' schemes: `w8a8`, `w4a16_sym+w8a8`.

    FLOAT is ignored. The kind of an unknown name is the name itself, which no entry has.
    """
    kinds = {_kind(name) for name in names if name != "FLOAT"}
    return "+".join(sorted(kinds))


def _kind(name: str) -> str:
    return next((kind for pattern, kind in _KINDS.items() if re.fullmatch(pattern, name)), name)


def loads_in(family: str, saver: str, schemes: Iterable[str], *, without_speech: bool = False) -> dict[str, Loads]:
    """What loads an output, by runtime; UNKNOWN where the table has no entry.

    family: the model_type of config.json. schemes: the names of its Linears' schemes. without_speech: whether talker
    and vocoder are left out, so that no class can speak.
    """
    kind = kind_of_schemes(schemes)
    entry = next((e for e in TABLE if (e.family, e.format, e.scheme) == (family, saver, kind)), None)
    found = {runtime: UNKNOWN if entry is None else entry.loads.get(runtime, UNKNOWN) for runtime in RUNTIMES}
    return {runtime: _silent(loads) if without_speech else loads for runtime, loads in found.items()}


def _silent(loads: Loads) -> Loads:
    return Loads(loads.verdict, loads.proof, loads.how, loads.answering, "", loads.packages)
