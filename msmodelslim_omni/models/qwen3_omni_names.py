"""Names of Qwen3-Omni: parts of the checkpoint, and module names in the loaders. Data only.

Sources: transformers 4.57 and 5.23 (modeling_qwen3_omni_moe.py), vLLM 0.32 (models/qwen3_omni_moe_thinker.py,
hf_to_vllm_mapper) and vLLM-Omni 0.30 (models/qwen3_omni/qwen3_omni.py). vLLM does not load talker and code2wav; its
audio tower is never quantized. vLLM-Omni builds its talker with the quantization config, and both towers without.
"""

from __future__ import annotations

from .spec import LibraryClass, LoaderNames, Part

LAYER_PREFIX = "thinker.model.layers.{index}."
EMBEDDING = "thinker.model.embed_tokens.weight"
TOWERS = ("thinker.visual.", "thinker.audio_tower.")
SPEECH = ("talker.", "code2wav.")

PARTS = (
    Part("decoder layers", "thinker.model.layers.", "not a Linear of a decoder layer"),
    Part("embedding", "thinker.model.embed_tokens.", "read by row, not used in a matrix product"),
    Part("final norm", "thinker.model.norm.", "a norm"),
    Part("lm_head", "thinker.lm_head.", "selects the output token; kept for accuracy"),
    Part("visual tower", "thinker.visual.", "towers are kept for accuracy"),
    Part("audio tower", "thinker.audio_tower.", "towers are kept for accuracy"),
    Part("talker", "talker.", "speech quality depends on it"),
    Part("code2wav", "code2wav.", "speech quality depends on it"),
    Part("other", "", "not part of a decoder layer"),
)

# `re:` patterns of modules that a runtime must not quantize. All begin with `.*`, because vLLM, vllm-omni and both
# versions of transformers put different prefixes before the names. vLLM builds the router with the quantization config.
IGNORE_PATTERNS = (
    "re:.*visual.*",
    "re:.*audio_tower.*",
    "re:.*lm_head",
    r"re:.*mlp\.gate$",
    "re:.*talker.*",
    "re:.*code2wav.*",
)

_THINKER_MODULES_5 = (
    ("thinker.visual.", "model.visual."),
    ("thinker.audio_tower.", "model.audio_tower."),
    ("thinker.model.", "model.language_model."),
    ("thinker.", ""),
)

LOADERS = LoaderNames(
    classes=(
        LibraryClass(
            "full class",
            "Qwen3OmniMoeForConditionalGeneration",
            modules=(("", ""),),
            modules_5=(*((disk, f"thinker.{module}") for disk, module in _THINKER_MODULES_5), ("", "")),
        ),
        LibraryClass(
            "thinker class",
            "Qwen3OmniMoeThinkerForConditionalGeneration",
            modules=(("thinker.", ""),),
            modules_5=_THINKER_MODULES_5,
            config_path=("thinker_config",),
        ),
    ),
    vllm=(
        ("thinker.audio_tower.", None),
        ("thinker.lm_head", "language_model.lm_head"),
        ("thinker.model.", "language_model.model."),
        ("thinker.", ""),
    ),
    vllm_omni=(
        ("thinker.audio_tower.", None),
        ("thinker.visual.", None),
        ("thinker.lm_head", "thinker.language_model.lm_head"),
        ("thinker.model.", "thinker.language_model.model."),
        ("talker.model.", "talker.language_model.model."),
        ("talker.", "talker."),
    ),
    architectures=("Qwen3OmniMoeForConditionalGeneration",),
    config_parts=(
        ("thinker_config",),
        ("thinker_config", "text_config"),
        ("thinker_config", "vision_config"),
        ("thinker_config", "audio_config"),
    ),
)


def disk_name(module_name: str) -> str:
    """Checkpoint name of a module name. transformers 5 nests the thinker's modules one level deeper than on disk."""
    return (
        module_name.replace("thinker.model.language_model.", "thinker.model.")
        .replace("thinker.model.visual.", "thinker.visual.")
        .replace("thinker.model.audio_tower.", "thinker.audio_tower.")
    )
