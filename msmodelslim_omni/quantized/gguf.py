"""export --save_format gguf: the text decoder of a quantized checkpoint as one GGUF file, for llama.cpp.

int8 becomes Q8_0, symmetric int4 Q4_0, int4 with zero points Q4_1: the integers are moved, nothing is rounded again.
What is stored in float16 (scales, Q4_1's minimum) may lose a little; the result says how much. llama.cpp rounds the
activations in its own way. Float tensors keep their bits (norms and biases as float32). Names and keys are those of its
qwen2vl and qwen3vl.

Left out: the vision and audio towers, which llama.cpp reads from a second file (mmproj), talker and vocoder. So the
file answers text only. llama.cpp was not run with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import QuantError
from ..files import check_save_path, find_model_folder
from ..formats import BLOCK_BYTES, GGUF_BLOCK, OutLinear, block_loss, block_type, pack_blocks
from ..runtime import Progress
from ..storage import TORCH_DTYPES, TensorInfo, load_finite, load_json_object
from .reader import QuantizedCheckpoint, finite_scales, open_quantized

FILE = "model.gguf"
_PADDING_TYPE, _NORMAL_TYPE, _CONTROL_TYPE, _USER_TYPE = 5, 1, 3, 4  # ggml's token types
_FILE_TYPES = {"Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1"}


@dataclass(frozen=True)
class ExportedGguf:
    """Summary of an export. lost: |stored - dequantized weights| / |weights| over all Linears; 0 if nothing is lost."""

    path: str
    source: str
    source_format: str
    types: tuple[str, ...]
    linears: int
    output_bytes: int
    lost: float
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file. shape: of the weights; kind: a ggml type; load: its data as numpy."""

    name: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    load: Callable[[], np.ndarray[Any, np.dtype[Any]]]


def export_gguf(
    path: str | Path,
    save_path: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    architecture: str = "",
) -> ExportedGguf:
    """Write the decoder as `model.gguf` into the folder save_path. An interrupted export begins again.

    architecture: another architecture with the same tensors, for readers that know no M-RoPE. Raises QuantError for a
    checkpoint that GGUF cannot hold.
    """
    gguf, progress = _require_gguf(), progress or Progress()
    source, folder = open_quantized(find_model_folder(path)), Path(save_path)
    check_save_path(folder, source.path)
    target = folder / FILE
    if target.exists() and not overwrite:
        raise QuantError(f"{target} exists", "pass --overwrite to replace it")
    _refuse(source)
    architecture = architecture or source.model.gguf_architecture
    losses = _Losses()
    tensors = list(_tensors(gguf, source, architecture, losses))
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{FILE}.partial"
    writer = gguf.GGUFWriter(str(temporary), architecture)
    _add_metadata(gguf, writer, source)
    _add_tokenizer(writer, source)
    for tensor in tensors:
        is_packed = tensor.kind in BLOCK_BYTES
        dtype = np.dtype(np.uint8 if is_packed else np.float32)
        shape = tensor.shape if not is_packed else (*tensor.shape[:-1], tensor.nbytes // tensor.shape[0])
        writer.add_tensor_info(
            tensor.name, shape, dtype, tensor.nbytes, raw_dtype=gguf.GGMLQuantizationType[tensor.kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, tensor in enumerate(tensors, 1):
        writer.write_tensor_data(tensor.load())
        progress.step("write gguf", done, len(tensors), "tensors")
    writer.close()
    temporary.replace(target)
    return ExportedGguf(
        path=str(target),
        source=str(source.path),
        source_format=source.saver,
        types=tuple(sorted({tensor.kind for tensor in tensors})),
        linears=len(source.linears),
        output_bytes=target.stat().st_size,
        lost=losses.relative(),
        left_out=_left_out(source),
    )


class _Losses:
    """The sums of block_loss over all Linears."""

    def __init__(self) -> None:
        self.error = self.signal = 0.0

    def relative(self) -> float:
        return float((self.error / self.signal) ** 0.5) if self.signal else 0.0


def _require_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise QuantError("export to gguf needs the package gguf", "pip install 'msmodelslim_omni[gguf]'") from error
    return gguf


def _refuse(source: QuantizedCheckpoint) -> None:
    """Raise QuantError for what GGUF, or llama.cpp, has no place for."""
    if not source.model.gguf_architecture:
        raise QuantError(
            f"gguf: {source.model.hf_model_type} has experts, which llama.cpp stores as one tensor a layer; this is not"
            " written yet",
            "serve it with vLLM",
        )
    if source.kv_cache is not None:
        raise QuantError(
            f"gguf has no place for the scales of a KV cache in {source.kv_cache}",
            "quantize with a recipe without kv_cache",
        )
    for name, stored in source.linears.items():
        scheme = stored.linear.scheme
        if not block_type(scheme):
            raise QuantError(
                f"gguf has no block for {scheme.name} ({name}): its blocks hold int8, or int4 in groups",
                "quantize the float checkpoint with --quant_type w8a16 or w4a16",
            )
        if stored.linear.shape[1] % GGUF_BLOCK:
            raise QuantError(f"gguf: {name} has {stored.linear.shape[1]} inputs, no multiple of {GGUF_BLOCK}")
    if not (source.path / "tokenizer.json").is_file():
        raise QuantError(f"{source.path} has no tokenizer.json", "copy it from the float checkpoint")


def _left_out(source: QuantizedCheckpoint) -> tuple[str, ...]:
    """The parts of the checkpoint that are not in the file."""
    written = set(_written_names(source))
    others = [name for name in (*source.floats, *(f"{n}.weight" for n in source.linears)) if name not in written]
    parts = {source.model.part_of(name) for name in others}
    return tuple(part.name for part in source.model.parts if part in parts)


# --- tensors -------------------------------------------------------------------------------------------------


def _written_names(source: QuantizedCheckpoint) -> dict[str, str]:
    """Checkpoint name -> llama.cpp's general name (`model.layers.0.self_attn.q_proj.weight`) of what is written."""
    spec, config = source.model, source.checkpoint.config
    shapes = spec.family.layer_spec(config).shapes
    embedding = f"{spec.norm.removesuffix('norm.weight')}embed_tokens.weight"
    names = {embedding: "model.embed_tokens.weight", spec.norm: "model.norm.weight", spec.head: "lm_head.weight"}
    for index in range(spec.family.num_layers(config)):
        names |= {spec.layer_name(index, name): f"model.layers.{index}.{name}" for name in shapes}
    return {name: general for name, general in names.items() if name in source.floats or _linear(source, name)}


def _linear(source: QuantizedCheckpoint, name: str) -> OutLinear | None:
    stored = source.linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    return None if stored is None else stored.linear


def _tensors(gguf: Any, source: QuantizedCheckpoint, architecture: str, losses: _Losses) -> Iterator[_Tensor]:
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, source.model.family.num_layers(source.checkpoint.config))
    for name, general in _written_names(source).items():
        own = table.get_name(general, try_suffixes=(".weight", ".bias"))
        assert own is not None, general  # every tensor of these layers has a name in llama.cpp
        linear = _linear(source, name)
        yield _float_tensor(own, source.floats[name]) if linear is None else _packed_tensor(own, linear, losses)


def _packed_tensor(name: str, linear: OutLinear, losses: _Losses) -> _Tensor:
    kind, (rows, columns) = block_type(linear.scheme), linear.shape

    def load() -> np.ndarray[Any, np.dtype[Any]]:
        q, scales = linear.qweight(), finite_scales(linear)
        zeros = None if linear.zeros is None else linear.zeros()
        error, signal = block_loss(kind, q, scales, zeros)
        losses.error, losses.signal = losses.error + error, losses.signal + signal
        return pack_blocks(kind, q, scales, zeros).numpy()

    return _Tensor(name, linear.shape, kind, rows * columns // GGUF_BLOCK * BLOCK_BYTES[kind], load)


def _float_tensor(name: str, info: TensorInfo) -> _Tensor:
    """A float tensor with its bits; vectors as float32, as llama.cpp expects norms and biases."""
    kind = "F32" if len(info.shape) == 1 else info.dtype

    def load() -> np.ndarray[Any, np.dtype[Any]]:
        tensor = load_finite(info)
        tensor = tensor.to(torch.float32) if kind == "F32" else tensor
        return tensor.contiguous().view(torch.uint8).numpy()

    size = TORCH_DTYPES[kind].itemsize
    return _Tensor(name, info.shape, kind, info.numel * size, load)


# --- metadata ------------------------------------------------------------------------------------------------


def _add_metadata(gguf: Any, writer: Any, source: QuantizedCheckpoint) -> None:
    config = source.checkpoint.config
    text, spec = source.model.family.text_config(config), source.model.family.layer_spec(config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    head_dim = text.get("head_dim") or hidden // heads
    writer.add_name(source.path.name)
    writer.add_context_length(text.get("max_position_embeddings", 32768))
    writer.add_embedding_length(hidden)
    writer.add_block_count(source.model.family.num_layers(config))
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(spec.key_width // head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(float(text.get("rope_theta") or rope.get("rope_theta") or 1e6))
    writer.add_layer_norm_rms_eps(float(text.get("rms_norm_eps", 1e-6)))
    if sections := rope.get("mrope_section"):
        writer.add_rope_dimension_sections([*sections, 0])
    if depth := source.model.family.deepstack_depth(config):
        writer.add_num_deepstack_layers(depth)
    kinds = [block_type(stored.linear.scheme) for stored in source.linears.values()]
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[max(sorted(set(kinds)), key=kinds.count)]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: Any, source: QuantizedCheckpoint) -> None:
    """The byte-level BPE of Qwen, from tokenizer.json. Tokens are padded to the rows of the embedding."""
    stored = load_json_object(source.path / "tokenizer.json")
    try:
        vocabulary: dict[str, int] = dict(stored["model"]["vocab"])
        merges = [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
        added = {int(token["id"]): (str(token["content"]), bool(token["special"])) for token in stored["added_tokens"]}
        by_id = {int(number): token for token, number in vocabulary.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise QuantError(
            f"{source.path / 'tokenizer.json'}: is not the byte-level BPE of a Qwen model", "fetch it again"
        ) from error
    rows = source.floats[next(iter(_written_names(source)))].shape[0]
    tokens, types = [], []
    for number in range(rows):
        if number in added:
            tokens.append(added[number][0])
            types.append(_CONTROL_TYPE if added[number][1] else _USER_TYPE)
        else:
            tokens.append(by_id.get(number, f"[PAD{number}]"))
            types.append(_NORMAL_TYPE if number in by_id else _PADDING_TYPE)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    numbers = {token: number for number, token in by_id.items()} | {token: n for n, (token, _) in added.items()}
    settings = _json_file(source.path / "tokenizer_config.json")
    for key, add in (("eos_token", writer.add_eos_token_id), ("pad_token", writer.add_pad_token_id)):
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token in numbers:
            add(numbers[token])
    writer.add_add_bos_token(False)
    template = settings.get("chat_template") or _json_file(source.path / "chat_template.json").get("chat_template")
    jinja = source.path / "chat_template.jinja"
    template = jinja.read_text(encoding="utf-8") if jinja.is_file() else template
    if isinstance(template, str):
        writer.add_chat_template(template)


def _json_file(path: Path) -> dict[str, Any]:
    return load_json_object(path) if path.is_file() else {}
