"""Write a tiny Qwen2.5-Omni checkpoint with random weights, in the layout of the official repositories.

    python examples/make_tiny_omni.py OUT [--dtype bfloat16|float32] [--seed 0] [--layers 4] [--single_file]

The checkpoint has all parts of the real ones: thinker, talker and token2wav weights, config, tokenizer, processor
settings, chat template and ``spk_dict.pt``. Tensor names and shapes come from the model classes of the installed
transformers (4.57 or 5.x); the values come from a generator seeded per tensor. Config and processor files are written
as plain JSON, not through the library, so that all files are the same under both transformers versions.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Json = dict[str, Any]

# Special tokens in the official order: token n has the id of token 0 (<|endoftext|>) plus n.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>",
    "<|IMAGE|>", "<|VIDEO|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
N_TRUE_SPECIAL = 14  # the official files do not mark the tool and fill-in-the-middle tokens as special
BPE_SIZE = 2816  # tokens of the trained tokenizer; larger vocabularies are padded with unused ones
USER_TOKEN_ID = 872  # id of "user" in the official vocabulary
# Speech ids of the thinker's vocabulary come after the tokenizer's ids; offsets from the id of <|endoftext|>.
TTS_OFFSETS = {"pad": 216, "start": 217, "end": 218}
SPEAKER_OFFSETS = {"Chelsie": 229, "Ethan": 230}
CODEC_OFFSETS = {"pad": 0, "start": 1, "end": 2, "mask": 4}

PROCESSOR_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}

SPLIT_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part['type'] == 'audio' or 'audio' in part or 'audio_url' in part %}"
    "<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The English part of the tokenizer's corpus is Python's language reference; this is the rest.
CORPUS = """
system
You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and
visual inputs, as well as generating text and speech. You are a helpful assistant.
user
Please describe the image in detail. What do you hear in the audio? What happens in the video clip?
assistant
The picture shows a small dog and a cat on a table. The speaker says good morning. The weather is fine today.
The quick brown fox jumps over the lazy dog. How many people are there? There are three people in the street.
你好，请问你是谁？我是一个人工智能助手，可以听懂语音，也可以看懂图片和视频。
请描述这张图片的内容。图片里有一只小狗和一只猫，它们在桌子上。
今天的天气怎么样？今天天气很好，阳光明媚，适合出去散步。
这段音频里说了什么？说话的人在说早上好，声音很清楚。
视频里发生了什么事情？一个人在街上走路，旁边有很多汽车。
模型量化可以减少内存的使用，并且提高推理的速度，但是可能会降低精度。
中国的首都是北京，上海是最大的城市。我们学习数学、物理、化学和历史。
"""


@dataclass(frozen=True)
class OmniShape:
    """Sizes that differ between Qwen2.5-Omni models, by part, with the keys of config.json."""

    text: Json
    vision: Json
    audio: Json
    talker: Json
    dit: Json
    bigvgan: Json
    endoftext_id: int
    codec_pad_id: int
    audio_seconds: int
    reference_frames: int

    def with_layers(self, layers: int | None) -> OmniShape:
        """The same shape with ``layers`` thinker layers (None: unchanged)."""
        return self if layers is None else replace(self, text={**self.text, "num_hidden_layers": layers})


TINY = OmniShape(
    text={
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 3072, "mrope_section": [8, 12, 12],
    },
    vision={
        "depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4,
        "fullatt_block_indexes": [1, 3], "out_hidden_size": 256,
    },
    audio={
        "d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 256,
        "output_dim": 256,
    },
    talker={
        "embedding_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 512,
        "mrope_section": [8, 12, 12],
    },
    dit={
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32, "emb_dim": 32,
        "num_embeds": 512, "enc_emb_dim": 16, "enc_dim": 32, "enc_channels": [32, 32, 32, 32, 96],
        "enc_attention_channels": 16, "enc_se_channels": 16, "look_ahead_layers": [1],
        "look_backward_layers": [0],
    },
    # Each of the six upsampling steps halves the channels.
    bigvgan={"upsample_initial_channel": 128},
    endoftext_id=BPE_SIZE,
    codec_pad_id=500,
    # The processor pads every audio to this length: 30 s are 1.5 MB of features, the official 300 s are 15 MB.
    audio_seconds=30,
    reference_frames=60,
)  # fmt: skip


# Sizes that are the same in all models.
_DIT_FIXED: Json = {
    "ff_mult": 2, "rope_theta": 10000.0, "max_position_embeddings": 32768, "block_size": 24, "repeats": 2,
    "mel_dim": 80, "dropout": 0.1, "enc_kernel_sizes": [5, 3, 3, 3, 1], "enc_dilations": [1, 2, 3, 4, 1],
    "enc_res2net_scale": 2,
}  # fmt: skip
_BIGVGAN_FIXED: Json = {
    "mel_dim": 80, "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "upsample_rates": [5, 3, 2, 2, 2, 2], "upsample_kernel_sizes": [11, 7, 4, 4, 4, 4],
}  # fmt: skip


# --------------------------------------------------------------------------------------------- config


def _rope(mrope_section: Sequence[int]) -> Json:
    """Rotary settings in the 4.57 spelling; ``mrope_section`` must add up to half a head."""
    return {
        "rope_theta": 1000000.0,
        "rope_scaling": {"mrope_section": list(mrope_section), "rope_type": "default", "type": "default"},
    }


def _decoder(sizes: Json) -> Json:
    """The keys that the thinker's text model and the talker share."""
    sizes = dict(sizes)
    mrope_section = sizes.pop("mrope_section")
    return {
        **sizes,
        **_rope(mrope_section),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "max_window_layers": sizes["num_hidden_layers"],
        "sliding_window": 32768,
        "use_sliding_window": False,
        "use_cache": True,
        "tie_word_embeddings": False,
    }


def special_ids(endoftext_id: int, tokens: Sequence[str] = SPECIAL_TOKENS) -> dict[str, int]:
    """Ids of the special tokens, by their text."""
    return {token: endoftext_id + n for n, token in enumerate(tokens)}


def omni_config(shape: OmniShape, dtype: str) -> Json:
    """The complete config.json, in the layout of transformers 4.57 and of the official repositories."""
    ids = special_ids(shape.endoftext_id)
    media_ids = {
        "audio_token_index": ids["<|AUDIO|>"],
        "image_token_index": ids["<|IMAGE|>"],
        "video_token_index": ids["<|VIDEO|>"],
        "audio_start_token_id": ids["<|audio_bos|>"],
        "audio_end_token_id": ids["<|audio_eos|>"],
        "vision_start_token_id": ids["<|vision_bos|>"],
        "vision_end_token_id": ids["<|vision_eos|>"],
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
    }
    text = {"model_type": "qwen2_5_omni_text", **_decoder(shape.text)}
    vision = {
        "model_type": "qwen2_5_omni_vision_encoder", **shape.vision, "embed_dim": shape.vision["hidden_size"],
        "hidden_act": "silu", "in_channels": 3, "in_chans": 3, "initializer_range": 0.02, "patch_size": 14,
        "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2, "tokens_per_second": 25,
        "window_size": 112,
    }  # fmt: skip
    audio = {
        "model_type": "qwen2_5_omni_audio_encoder", **shape.audio,
        "num_hidden_layers": shape.audio["encoder_layers"], "activation_function": "gelu",
        "activation_dropout": 0.0, "attention_dropout": 0.0, "dropout": 0.0, "initializer_range": 0.02,
        "max_source_positions": 1500, "n_window": 100, "num_mel_bins": 128, "scale_embedding": False,
    }  # fmt: skip
    talker = {
        "model_type": "qwen2_5_omni_talker",
        "architectures": ["Qwen2OmniTalkerForConditionalGeneration"],
        **_decoder(shape.talker),
        **media_ids,
        **{f"tts_text_{k}_token_id": shape.endoftext_id + v for k, v in TTS_OFFSETS.items()},
        **{f"tts_codec_{k}_token_id": shape.codec_pad_id + v for k, v in CODEC_OFFSETS.items()},
        "spatial_merge_size": 2,
        "torch_dtype": dtype,
    }
    thinker = {
        "model_type": "qwen2_5_omni_thinker",
        "architectures": ["Qwen2OmniNaViTThinkerForConditionalGeneration"],
        **media_ids,
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "user_token_id": USER_TOKEN_ID,
        "ignore_index": -100,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
        "audio_config": audio,
        "torch_dtype": dtype,
    }
    token2wav = {
        "model_type": "qwen2_5_omni_token2wav",
        "bigvgan_config": {"model_type": "qwen2_5_omni_bigvgan", **_BIGVGAN_FIXED, **shape.bigvgan},
        "dit_config": {"model_type": "qwen2_5_omni_dit", **_DIT_FIXED, **shape.dit, "torch_dtype": "float32"},
        "torch_dtype": "float32",
    }
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": True,
        "enable_talker": True,
        "thinker_config": thinker,
        "talker_config": talker,
        "token2wav_config": token2wav,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "transformers_version": "4.52.3",
    }


def generation_config(endoftext_id: int) -> Json:
    """generation_config.json: the stop and padding tokens."""
    ids = special_ids(endoftext_id)
    return {
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "transformers_version": "4.52.3",
    }


def write_json(path: Path, value: Json) -> None:
    """Write ``value`` indented, with unescaped non-ASCII text and a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------ tokenizer


def corpus() -> Iterator[str]:
    """Training text for the tokenizer: Python's language reference, some chat and Chinese sentences.

    The reference can differ between Python versions, and with it the token ids of a text; the weights do not.
    """
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    yield from [CORPUS] * 20  # often enough that Chinese words and roles become tokens


Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]


@functools.cache
def train_bpe(vocab_size: int) -> Vocabulary:
    """Byte-level BPE of ``vocab_size`` tokens: (token -> id, merges), with "user" at its official id."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    # Merges refer to tokens, not ids, so two tokens may swap their ids.
    resident = next(token for token, index in vocab.items() if index == USER_TOKEN_ID)
    vocab[resident], vocab["user"] = vocab["user"], USER_TOKEN_ID
    merges = [_pair(merge) for merge in model["merges"]]
    return dict(sorted(vocab.items(), key=lambda item: item[1])), merges


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """Both tokens of a merge, which is one string or a list, depending on the release of tokenizers."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def pad_vocab(vocab: dict[str, int], size: int) -> dict[str, int]:
    """``vocab`` padded to ``size`` with tokens that no text produces, so that the special tokens get their ids."""
    return {**vocab, **{f"<unused_{index}>": index for index in range(len(vocab), size)}}


def tokenizer_json(vocab: dict[str, int], merges: Sequence[tuple[str, str]], ids: dict[str, int]) -> Json:
    """tokenizer.json of a byte-level Qwen2 tokenizer."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, **token} for index, token in added_tokens(ids).items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT_REGEX}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [" ".join(pair) for pair in merges],
        },
    }


def added_tokens(ids: dict[str, int]) -> dict[int, Json]:
    """Settings of the special tokens by id, in the form of tokenizer.json and tokenizer_config.json."""
    return {
        index: {
            "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": number < N_TRUE_SPECIAL,
        }
        for number, (token, index) in enumerate(ids.items())
    }  # fmt: skip


def tokenizer_config(ids: dict[str, int]) -> Json:
    """tokenizer_config.json; the processor reads the media tokens as attributes of the tokenizer."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): token for index, token in added_tokens(ids).items()},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:N_TRUE_SPECIAL]),
        **PROCESSOR_TOKENS,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": PROCESSOR_TOKENS,
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen2_5OmniProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def special_tokens_map() -> Json:
    """special_tokens_map.json."""
    return {
        "additional_special_tokens": list(SPECIAL_TOKENS[1:N_TRUE_SPECIAL]),
        **PROCESSOR_TOKENS,
        "eos_token": plain_token("<|im_end|>"),
        "pad_token": plain_token("<|endoftext|>"),
    }


def plain_token(token: str) -> Json:
    """One token in special_tokens_map.json."""
    return {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


IMAGE_SETTINGS: Json = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "merge_size": 2,
    "patch_size": 14,
    "temporal_patch_size": 2,
}


def preprocessor_config(audio_seconds: int) -> Json:
    """preprocessor_config.json: image (and video) settings and Whisper's audio settings in one file.

    ``processor.save_pretrained`` of 4.57 would omit the image settings; the official file has both.
    """
    sampling_rate, hop_length = 16000, 160
    return {
        "processor_class": "Qwen2_5OmniProcessor",
        "feature_extractor_type": "WhisperFeatureExtractor",
        **IMAGE_SETTINGS,
        "chunk_length": audio_seconds,
        "dither": 0.0,
        "feature_size": 128,
        "hop_length": hop_length,
        "n_fft": 400,
        "n_samples": audio_seconds * sampling_rate,
        "nb_max_frames": audio_seconds * sampling_rate // hop_length,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": sampling_rate,
    }


def write_processor(out: Path, shape: OmniShape) -> None:
    """Write the tokenizer, processor and chat template files into ``out``."""
    ids = special_ids(shape.endoftext_id)
    write_vocabulary(out, ids)
    write_json(out / "tokenizer_config.json", tokenizer_config(ids))
    write_json(out / "special_tokens_map.json", special_tokens_map())
    write_json(out / "preprocessor_config.json", preprocessor_config(shape.audio_seconds))
    write_json(out / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def write_vocabulary(out: Path, ids: dict[str, int], trained: Vocabulary | None = None) -> None:
    """Write the tokenizer's vocabulary files: the text tokens, followed by these special tokens.

    trained: token -> id, and merges; by default those of train_bpe.
    """
    vocab, merges = trained or train_bpe(BPE_SIZE)
    vocab = pad_vocab(vocab, min(ids.values()))
    write_json(out / "tokenizer.json", tokenizer_json(vocab, merges, ids))
    write_json(out / "added_tokens.json", ids)
    (out / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (out / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_speakers(out: Path, shape: OmniShape, seed: int) -> None:
    """Write spk_dict.pt: start token, speaker vector and reference mel spectrogram of each voice."""
    normal = SeededNormal(seed)
    mel_dim = _DIT_FIXED["mel_dim"]
    speakers = {
        name: {
            "bos_token": shape.endoftext_id + offset,
            "cond": normal(f"{name}.cond", (1, shape.dit["enc_emb_dim"])),
            "ref_mel": normal(f"{name}.ref_mel", (1, shape.reference_frames, mel_dim)),
        }
        for name, offset in SPEAKER_OFFSETS.items()
    }
    torch.save(speakers, out / "spk_dict.pt")


# -------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the checkpoint: its name on disk, and the normal distribution of its values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    mean: float
    std: float

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return self.numel * self.dtype.itemsize


def shim_torchvision() -> None:
    """Make a torchvision built for CUDA importable with a torch without CUDA; otherwise do nothing.

    PyPI's torchvision is the CUDA build. Without the CUDA libraries it does not register its operators; then its import
    fails on ``torchvision::nms``, and so does the import of every transformers model that uses images. Declaring the
    operators is enough, because nothing here runs them.
    """
    spec = find_spec("torchvision")
    if torch.version.cuda is not None or spec is None or spec.origin is None:
        return
    version = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    if not re.search(r"\+cu\d", version) or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _SHIM.append(library)


_SHIM: list[torch.library.Library] = []  # keeps the library object alive, and with it the operators

# transformers 5 nests the thinker's parts one level deeper than the files do.
_DISK_NAMES = (
    ("thinker.model.language_model.", "thinker.model."),
    ("thinker.model.visual.", "thinker.visual."),
    ("thinker.model.audio_tower.", "thinker.audio_tower."),
)
_VOCODER = "token2wav.code2wav_bigvgan_model."
_VOCODER_GAIN = 0.7  # at 1 the vocoder's many residual sums clip the waveform
_DIT_INV_FREQ = "token2wav.code2wav_dit_model.rotary_embed.inv_freq"


def disk_name(name: str) -> str:
    """Name in the checkpoint of a parameter called ``name`` in the installed transformers."""
    for prefix, short in _DISK_NAMES:
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name


def value_range(module: nn.Module, leaf: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation for the parameter ``leaf`` of ``module``."""
    if leaf == "bias":
        return 0.0, 0.05
    if isinstance(module, nn.Embedding):
        return 0.0, 1.0
    if isinstance(module, nn.ConvTranspose1d):  # (in, out, kernel); each output reads kernel / stride taps
        return 0.0, (shape[0] * shape[2] / module.stride[0]) ** -0.5
    if len(shape) > 1:  # linear (out, in) and convolution (out, in, kernel...)
        return 0.0, math.prod(shape[1:]) ** -0.5
    if leaf == "weight":  # norms
        return 1.0, 0.15
    if leaf in ("scale", "gamma"):  # of a residual branch
        return 0.1, 0.01
    if leaf in ("alpha", "beta"):  # logarithms of the vocoder's activation parameters
        return 0.0, 0.1
    raise ValueError(f"no rule for {leaf} of {type(module).__name__} with shape {shape}")


def tensor_specs(config_dir: Path, dtype: torch.dtype) -> list[TensorSpec]:
    """Every tensor of the model described by ``config_dir``/config.json, in storage order.

    The model is instantiated on the meta device, so it takes no memory; only names and shapes are used.
    """
    shim_torchvision()
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

    config = Qwen2_5OmniConfig.from_pretrained(config_dir)
    with torch.device("meta"):
        model = Qwen2_5OmniForConditionalGeneration(config)
    specs = {}
    for spec in parameter_specs(model, disk_name, dtype):
        # The official files store token2wav in float32, and the library always runs it in float32.
        stored = torch.float32 if spec.name.startswith("token2wav.") else dtype
        gain = _VOCODER_GAIN if spec.name.startswith(_VOCODER) and len(spec.shape) > 1 else 1.0
        specs[spec.name] = replace(spec, dtype=stored, std=spec.std * gain)
    # The only buffer in the official files; in transformers 5 it is not a buffer.
    half_head = config.token2wav_config.dit_config.head_dim // 2
    specs[_DIT_INV_FREQ] = TensorSpec(_DIT_INV_FREQ, (half_head,), torch.float32, 0.0, 0.0)
    return sorted(specs.values(), key=_storage_order)


def parameter_specs(model: nn.Module, named: Callable[[str], str], dtype: torch.dtype) -> Iterator[TensorSpec]:
    """Every parameter of ``model`` with its name in the files; a parameter that two modules share appears twice."""
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            shape = tuple(parameter.shape)
            yield TensorSpec(named(f"{prefix}.{leaf}"), shape, dtype, *value_range(module, leaf, shape))


def tied(specs: Iterable[TensorSpec], embedding: str) -> list[TensorSpec]:
    """The tensors of a model whose embedding is also the lm_head: its values are scaled like those of an lm_head."""
    by_name = {spec.name: spec for spec in specs}
    head = by_name.pop("lm_head.weight")
    by_name[embedding] = replace(by_name[embedding], std=head.shape[1] ** -0.5)
    return list(by_name.values())


def _storage_order(spec: TensorSpec) -> tuple[Any, ...]:
    """Sort key: thinker, talker, token2wav; within each by name, with numbers by value."""
    return ("thinker", "talker", "token2wav").index(spec.name.split(".")[0]), name_order(spec.name)


def name_order(name: str) -> list[tuple[int, str]]:
    """Sort key of a name, with numbers by value."""
    return [(int(s), "") if s.isdigit() else (-1, s) for s in name.split(".")]


# --------------------------------------------------------------------------------------------- values

NormalSource = Callable[[str, tuple[int, ...]], Tensor]
"""(tag, shape) -> standard normal float32 values, the same for the same tag."""


def stable_hash(*parts: object) -> int:
    """63-bit number that depends only on ``parts``, not on the Python process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class SeededNormal:
    """Normal values from a generator seeded by (seed, tag), independent of the order of calls."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, tag: str, shape: tuple[int, ...]) -> Tensor:
        """Values of the given shape, float32."""
        generator = torch.Generator().manual_seed(stable_hash(self.seed, tag))
        return torch.randn(shape, generator=generator)


def outlier_gains(tag: str, size: int, seed: int) -> Tensor:
    """Gains (size,): 16 or 32 for a few channels chosen by (seed, tag), 1 for the others."""
    generator = torch.Generator().manual_seed(stable_hash(seed, "outliers", tag))
    count = max(2, size // 64)
    gains = torch.ones(size)
    channels = torch.randperm(size, generator=generator)[:count]
    gains[channels] = 2.0 ** torch.randint(4, 6, (count,), generator=generator)
    return gains


_LAYER_KEY = re.compile(
    r"((?:thinker\.)?model\.(?:language_model\.)?layers\.\d+)"
    r"\.(?:self_attn\.|mlp\.(?:experts\.\d+\.)?)?(\w+)\.weight"
)
# Activation whose gains multiply a tensor's rows, and activation whose gains divide its columns.
_ROW_GAINS = {"input_layernorm": "attn_in", "post_attention_layernorm": "mlp_in", "up_proj": "mlp_inner"}
_COLUMN_GAINS = {
    "q_proj": "attn_in", "k_proj": "attn_in", "v_proj": "attn_in", "gate_proj": "mlp_in", "up_proj": "mlp_in",
    "down_proj": "mlp_inner", "gate": "mlp_in",
}  # fmt: skip


def outlier_factors(spec: TensorSpec, seed: int) -> tuple[Tensor | None, Tensor | None]:
    """Factors for the rows (shape[0],) and the columns (shape[1],) of a tensor; None if it has no such factors.

    In the thinker's (or VL's) decoder layers, a few channels of each norm's output and of down_proj's input become 16
    or 32 times larger, and the weights that read them become smaller by the same factor. The factors are powers of two,
    so the model computes the same function, but its activations have outlier channels, as in real LLMs.
    """
    match = _LAYER_KEY.fullmatch(spec.name)
    if match is None:
        return None, None
    layer, leaf = match.groups()
    rows = columns = None
    if leaf in _ROW_GAINS:
        rows = outlier_gains(f"{layer}.{_ROW_GAINS[leaf]}", spec.shape[0], seed)
    if leaf in _COLUMN_GAINS:
        columns = 1.0 / outlier_gains(f"{layer}.{_COLUMN_GAINS[leaf]}", spec.shape[1], seed)
    return rows, columns


BLOCK = 1 << 18  # elements made at a time: limits the memory, and fits into the processor's cache


def tensor_blocks(spec: TensorSpec, normal: NormalSource, outlier_seed: int | None) -> Iterator[Tensor]:
    """The values of one tensor as consecutive blocks of its rows, in its dtype."""
    if spec.name == _DIT_INV_FREQ:
        exponent = torch.arange(spec.shape[0], dtype=torch.float32) / spec.shape[0]
        yield 1.0 / _DIT_FIXED["rope_theta"] ** exponent
        return
    rows, columns = (None, None) if outlier_seed is None else outlier_factors(spec, outlier_seed)
    row_size = math.prod(spec.shape[1:])
    step = max(1, BLOCK // row_size)
    for start in range(0, spec.shape[0], step):
        stop = min(start + step, spec.shape[0])
        block = normal(f"{spec.name}[{start}]", (stop - start, *spec.shape[1:])) * spec.std
        if spec.mean:
            block += spec.mean
        if rows is not None:
            block *= rows[start:stop].reshape(-1, *[1] * (block.ndim - 1))
        if columns is not None:
            block *= columns
        yield block.to(spec.dtype)


# ---------------------------------------------------------------------------------------------- files

BlockSource = Callable[[TensorSpec], Iterator[Tensor]]
"""Returns the values of one tensor as consecutive blocks of its rows."""

_SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write_safetensors(path: Path, specs: Sequence[TensorSpec], blocks: BlockSource | None) -> None:
    """Write one safetensors file tensor by tensor; without ``blocks`` its data is a hole that reads as zeros.

    The library's ``save_file`` needs all tensors of a file in memory; this function needs one block.
    """
    header: Json = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # align the data
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        if blocks is None:
            file.truncate(8 + len(encoded) + offset)
            return
        for spec in specs:
            for block in blocks(spec):
                file.write(block.contiguous().view(torch.uint8).numpy().data)
        if file.tell() != 8 + len(encoded) + offset:
            raise RuntimeError(f"{path}: wrote {file.tell()} bytes, expected {8 + len(encoded) + offset}")


def shard_plan(specs: Sequence[TensorSpec], shards: int) -> list[list[TensorSpec]]:
    """Split ``specs`` into at most ``shards`` consecutive groups of about equal size."""
    total = sum(spec.nbytes for spec in specs)
    groups: list[list[TensorSpec]] = [[] for _ in range(shards)]
    offset = 0
    for spec in specs:
        groups[min(shards - 1, (offset + spec.nbytes // 2) * shards // total)].append(spec)
        offset += spec.nbytes
    return [group for group in groups if group]


def write_weights(out: Path, specs: Sequence[TensorSpec], shards: int, blocks: BlockSource | None) -> None:
    """Write the safetensors files, and an index if there are several."""
    groups = shard_plan(specs, shards)
    if len(groups) == 1:
        write_safetensors(out / "model.safetensors", groups[0], blocks)
        return
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        filename = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_safetensors(out / filename, group, blocks)
        weight_map.update({spec.name: filename for spec in group})
    total_size = sum(spec.nbytes for spec in specs)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out / "model.safetensors.index.json", index)


def write_model(
    out: Path,
    config: Json,
    endoftext_id: int,
    specs_of: Callable[[Path, torch.dtype], list[TensorSpec]],
    *,
    dtype: str,
    seed: int,
    normal: NormalSource | None,
    shards: int | None = None,
    shard_bytes: float = math.inf,
    outliers: bool = True,
) -> list[TensorSpec]:
    """Write the configuration of a model and its tensors into ``out``, and return the specs of the tensors.

    ``specs_of``: the tensors of the model that ``out``/config.json describes, in a dtype. ``normal`` gives the values;
    without it the files have headers only. The tensors go into ``shards`` files, by default into files of about
    ``shard_bytes``.
    """
    make_folder(out)
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", generation_config(endoftext_id))
    specs = specs_of(out, getattr(torch, dtype))
    outlier_seed = seed if outliers else None
    count = shard_count(specs, shard_bytes) if shards is None else shards
    blocks = None if normal is None else lambda spec: tensor_blocks(spec, normal, outlier_seed)
    write_weights(out, specs, count, blocks)
    return specs


def write_checkpoint(out: Path, shape: OmniShape, *, dtype: str, seed: int, **options: Any) -> list[TensorSpec]:
    """Write a complete checkpoint of the given shape into ``out`` and return the specs of its tensors.

    ``dtype`` is the dtype of thinker and talker; token2wav is always float32. ``options``: see write_model.
    """
    config = omni_config(shape, dtype)
    specs = write_model(out, config, shape.endoftext_id, tensor_specs, dtype=dtype, seed=seed, **options)
    write_processor(out, shape)
    write_speakers(out, shape, seed)
    return specs


def make_folder(out: Path) -> None:
    """Create ``out``, which must hold no checkpoint yet."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.safetensors")):
        raise FileExistsError(f"{out} already holds a checkpoint")


def shard_count(specs: Sequence[TensorSpec], shard_bytes: float) -> int:
    """Number of files of about ``shard_bytes`` each."""
    return max(1, math.ceil(sum(spec.nbytes for spec in specs) / shard_bytes))


def make_tiny_omni(
    out: Path,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    layers: int = 4,
    shards: int = 2,
    outliers: bool = True,
) -> Path:
    """Write the tiny checkpoint into ``out`` (created, must hold no checkpoint yet) and return ``out``.

    ``shards=1`` writes a single model.safetensors without an index. The same arguments give the same weight bytes.
    ``outliers=False`` writes a model with the same function but no outlier channels.
    """
    out = Path(out)
    shape = TINY.with_layers(layers)
    normal = SeededNormal(seed)
    write_checkpoint(out, shape, dtype=dtype, seed=seed, shards=shards, normal=normal, outliers=outliers)
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a tiny Qwen2.5-Omni with random weights.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write the checkpoint into")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the thinker")
    parser.add_argument("--single_file", action="store_true", help="write one model.safetensors without an index")
    args = parser.parse_args()
    shards = 1 if args.single_file else 2
    out = make_tiny_omni(args.out, dtype=args.dtype, seed=args.seed, layers=args.layers, shards=shards)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
