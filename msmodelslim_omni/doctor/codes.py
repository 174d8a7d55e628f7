"""Every kind of finding: its level, why it matters, which runtimes it affects, and what to do. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VLLM, ASCEND, AUTOAWQ = "vLLM", "vLLM-Ascend", "AutoAWQ"
TF4, TF5 = "transformers 4.57", "transformers 5.x"
TRANSFORMERS = (TF4, TF5)
ALL = (VLLM, ASCEND, TF4, TF5, AUTOAWQ)
CONFIG_READERS = (VLLM, TF4, TF5, AUTOAWQ)

_COPY_AGAIN = "copy or download the file again"
_QUANTIZE_AGAIN = "quantize again"
_RESTORE_CONFIG = "restore this part of config.json from the source, or quantize again"


@dataclass(frozen=True)
class Kind:
    level: Literal["warning", "error"]
    why: str
    runtimes: tuple[str, ...]
    todo: str


def _error(why: str, runtimes: tuple[str, ...], todo: str) -> Kind:
    return Kind("error", why, runtimes, todo)


def _warning(why: str, runtimes: tuple[str, ...], todo: str) -> Kind:
    return Kind("warning", why, runtimes, todo)


_FILES = {
    "no_weights": _error("there is nothing to load", ALL, "give the folder that contains the safetensors files"),
    "file_truncated": _error("the file ends before its last tensor ends", ALL, _COPY_AGAIN),
    "file_trailing_bytes": _error("the file has bytes after the last tensor, so readers reject it", ALL, _COPY_AGAIN),
    "file_broken": _error("the header is invalid, so no tensor in the file can be loaded", ALL, _COPY_AGAIN),
    "file_unreadable": _error("the file cannot be opened", ALL, "check the file's permissions and the disk"),
    "json_broken": _error("loaders read this file and fail", ALL, _COPY_AGAIN),
    "unfinished_run": _error(
        "a run stopped here; part of this checkpoint may come from that run", ALL,
        "run the same command again to resume, or delete this if the checkpoint is complete",
    ),
    "pickle_weights": _warning(
        "doctor does not examine weights in pickle files, and a loader may prefer them", TRANSFORMERS, "delete them",
    ),
    "tensor_twice": _error("a tensor is stored in two files, and loaders may pick either", ALL,
                           "delete the file that is left over from another run"),
    "check_failed": _error("this check did not finish, so its result is unknown", ALL,
                           "inspect the named file and report this as a bug"),
}  # fmt: skip

_INDEX = {
    "index_missing": _error("without an index, loaders do not find the shards", (VLLM, *TRANSFORMERS),
                            "restore the index file, or quantize again"),
    "index_no_weight_map": _error("transformers reads weight_map and fails", TRANSFORMERS,
                                  "write {metadata: {total_size}, weight_map: {tensor: file}}"),
    "index_names_absent_shard": _error("loaders open every file that the index names", (VLLM, *TRANSFORMERS),
                                       "download the missing file again"),
    "index_names_absent_tensor": _error("the index places the tensor in a file that does not contain it", TRANSFORMERS,
                                        _COPY_AGAIN),
    "index_wrong_shard": _error("transformers looks for the tensor in the wrong file", TRANSFORMERS,
                                "correct the index entry"),
    "index_lacks_tensor": _error("transformers never loads the tensor; the weight stays random without an error",
                                 TRANSFORMERS, "add the tensor to the index"),
    "shard_unlisted": _error("some loaders read every file in the folder, others only the files in the index", ALL,
                             "delete the file if it is left over from another run; otherwise add it to the index"),
    "total_size_wrong": _warning(
        "index and shards may come from different versions, and loaders may plan memory wrongly", TRANSFORMERS,
        "correct metadata.total_size",
    ),
    "index_stale": _warning("a second index; loaders may read the wrong one", (VLLM, *TRANSFORMERS), "delete it"),
}  # fmt: skip

_TENSORS = {
    "tensor_missing": _error("loading fails, or the weight stays random without an error", ALL, _QUANTIZE_AGAIN),
    "linear_incomplete": _error(
        "a quantized Linear lacks one of its tensors: loading fails, or outputs are garbage without an error", ALL,
        _QUANTIZE_AGAIN,
    ),
    "tensor_unexpected": _error("vLLM rejects names that the model does not have", (VLLM, ASCEND),
                                "rename or remove the tensor"),
    "prefix_dropped": _error(
        "names must start with the prefixes of the full model; vLLM's mapper and the full class find none of these",
        (VLLM, ASCEND, *TRANSFORMERS),
        "save with the full model's names, e.g. with the prefix thinker. for the thinker of an Omni model",
    ),
    "part_missing": _warning("this checkpoint cannot generate speech, although its config enables it", TRANSFORMERS,
                             "set enable_audio_output to false, or quantize again from a complete checkpoint"),
    "tensor_shape": _error("loading fails", ALL, _QUANTIZE_AGAIN),
    "tensor_dtype": _error("loading fails, or values are cast to another dtype without an error", ALL,
                           _QUANTIZE_AGAIN),
    "form_foreign": _error("the tensors have a different format than config.json declares", ALL,
                           "declare the right format, or quantize again"),
    "float_not_finite": _error("every output becomes NaN", ALL, "download the source again and quantize again"),
}  # fmt: skip

_CONTENT = {
    "scale_nan": _error("every output of this Linear becomes NaN: calibration failed", ALL, _QUANTIZE_AGAIN),
    "scale_inf": _error("outputs become Inf or NaN: calibration failed", ALL, _QUANTIZE_AGAIN),
    "scale_zero": _error("a zero scale sets these channels to zero; often the weights were never loaded", ALL,
                         _QUANTIZE_AGAIN),
    "scale_negative": _warning("kernels multiply by it, but quantizers never write it; often the file was misread", ALL,
                               "compare with the source: doctor --source"),
    "scale_denormal": _error("accelerators flush denormal numbers to zero, which sets these channels to zero", ALL,
                             _QUANTIZE_AGAIN),
    "scale_subnormal": _warning("float16 subnormals have few bits; kernels that flush subnormals zero the group",
                                (VLLM, AUTOAWQ), "check whether these channels matter: doctor --source"),
    "scale_bias_wrong": _error(
        "vLLM-Ascend's product of int4 experts adds scale_bias; another value shifts every output",
        (ASCEND,), "write 8 times the sum of each dequantized row",
    ),
    "offset_not_zero": _error("vLLM-Ascend loads the offset but does not apply it in the matrix product", (ASCEND,),
                              "quantize symmetrically"),
    "code_nan": _error("an FP8 code is NaN: a value above 448 was not clamped, and outputs become NaN", ALL,
                       _QUANTIZE_AGAIN),
    "integers_all_zero": _error("the entire weight is zero", ALL, _QUANTIZE_AGAIN),
    "integers_constant": _error("all integers are equal: the file was never filled", ALL, _QUANTIZE_AGAIN),
    "row_constant": _error("all integers of an output channel are equal; real weights vary", ALL, _QUANTIZE_AGAIN),
    "row_zero": _warning("all weights of these output channels are zero: unused in the source, or lost", ALL,
                         "compare with the source: doctor --source"),
    "saturated": _warning("many integers are at the ends of their range: the scales are too small", ALL,
                          "compare with the source (doctor --source); quantize again"),
    "zero_point_shifted": _error(
        "integers and zero points differ by a constant on average: one of them is off, e.g. by GPTQ's minus one", ALL,
        "convert again without changing the stored zero points",
    ),
    "zero_point_unrelated": _error(
        "zero points do not match the integers: wrong nibble order or wrong axis", ALL,
        "pack integers and zero points in the order that the format defines",
    ),
    "nf4_state_wrong": _error("bitsandbytes cannot unpack the weight, or unpacks wrong numbers", TRANSFORMERS,
                              _QUANTIZE_AGAIN),
    "weight_shape_wrong": _error("weight_shape does not match the shape of the weight", (VLLM, *TRANSFORMERS),
                                 _QUANTIZE_AGAIN),
}  # fmt: skip

_NAMES = {
    "loader_expects_quantized": _error(
        "the loader builds a quantized module for a float Linear: an error, or random weights without an error", ALL,
        "add the Linear to the list of Linears that stay float (modules_to_not_convert, ignore or"
        " llm_int8_skip_modules)",
    ),
    "loader_expects_float": _error(
        "the loader builds a float module for a quantized Linear and reads integers as weights, often without an"
        " error", ALL, "remove the Linear from the list of Linears that stay float",
    ),
    "loader_expects_other_bits": _error(
        "with several groups, the loader assigns this Linear to a group with other bits than it is stored with: an"
        " error, or garbage",
        CONFIG_READERS, "name the Linear in the targets of its own group",
    ),
    "autoawq_cannot_say": _warning(
        "AutoAWQ matches names within a layer and cannot exclude a Linear in one layer only; other loaders can",
        (AUTOAWQ,), "if AutoAWQ must load it, keep the Linear float in all layers or in none",
    ),
    "fused_split": _error(
        "runtimes fuse q, k, v and gate, up, and require the same form for all parts", (VLLM, ASCEND),
        "quantize all parts of the group or none",
    ),
    "fused_scales_differ": _error(
        "runtimes fuse q, k, v and gate, up, and use the largest of their global scales for all parts", (VLLM,),
        "quantize again; all parts need one global scale",
    ),
    "tower_quantized": _warning(
        "only Linears of decoder layers should be quantized; towers, lm_head and speech parts lose accuracy,"
        " and few loaders can read them quantized", ALL, "keep it float",
    ),
    "router_quantized": _error(
        "routers select the experts of each token; runtimes build them float, or read this one as garbage", ALL,
        "keep the router float and quantize again",
    ),
    "experts_incomplete": _error(
        "all experts of a layer are one module of the runtimes: loading fails, or these experts stay random without an"
        " error", ALL, _QUANTIZE_AGAIN,
    ),
    "experts_differ": _error("runtimes take the scheme of expert 0 for all experts of a layer", ALL,
                             "quantize all experts of a layer alike"),
    "pattern_refused": _warning("this pattern can take hours to match, so doctor does not check it", ALL,
                                "write a simpler pattern"),
    "description_missing_entry": _error("vLLM-Ascend looks up this entry and fails with a KeyError", (ASCEND,),
                                        "add the entry: FLOAT for float tensors"),
    "description_incomplete": _warning("msModelSlim writes an entry for every tensor", (ASCEND,), "add the entry"),
    "description_wrong_type": _error(
        "vLLM-Ascend builds the module that the description names, which does not match the stored tensors",
        (ASCEND,), "correct the entry",
    ),
    "description_unsupported": _error("vLLM-Ascend has no Linear of this type", (ASCEND,),
                                      "quantize to W8A8_DYNAMIC"),
    "description_stale": _warning("the description names tensors that do not exist: it comes from another run",
                                  (ASCEND,), "use the description that was written with these weights"),
}  # fmt: skip

_CONFIG_KINDS = {
    "config_missing": _error("loaders need config.json", ALL, "copy config.json from the source"),
    "config_foreign": _error("this tool does not support the model, so names and shapes are not checked", ALL,
                             "give a checkpoint of Qwen2.5-Omni, Qwen2.5-VL, Qwen3-Omni or Qwen3-VL"),
    "config_thinker_only": _error(
        "vLLM supports only the full model's architecture and reads hf_config.thinker_config", (VLLM, ASCEND),
        "keep the source's complete config.json, also when talker and token2wav are omitted",
    ),
    "config_architecture": _error("vLLM selects the model by architecture and does not support this one",
                                  (VLLM, ASCEND), _RESTORE_CONFIG),
    "config_part_missing": _error("the model cannot be built", ALL, _RESTORE_CONFIG),
    "config_unbuildable": _error("transformers cannot build a model from it, so names and shapes are not checked", ALL,
                                 _RESTORE_CONFIG),
    "float_checkpoint": _warning("every runtime of the model loads it as a float model", (),
                                 "`msmodelslim quant` makes a quantized checkpoint of it"),
    "not_quantized": _error("nothing in this checkpoint is quantized", ALL, _QUANTIZE_AGAIN),
    "quantization_config_missing": _error("integers are loaded as if they were float weights", CONFIG_READERS,
                                          _RESTORE_CONFIG),
    "quantization_config_not_in_thinker": _warning(
        "the thinker class reads only this place; without it, 5.x loads integers as weights without an error",
        TRANSFORMERS, "copy it into thinker_config, or load only the full class",
    ),
    "quantization_config_only_in_thinker": _error("vLLM and the full class read only the top level",
                                                  (VLLM, *TRANSFORMERS), "copy it to the top level"),
    "quantization_config_differs": _error("the class that loads the checkpoint decides which one is used",
                                          (VLLM, *TRANSFORMERS), "make both equal"),
    "quantization_config_stale": _error(
        "it contradicts quant_model_description.json, which selects vLLM-Ascend's method", (ASCEND, VLLM),
        "remove it from config.json",
    ),
    "quantization_config_stray": _warning("no loader of this model reads it there", ALL, "remove it"),
    "quantization_config_no_method": _error("vLLM-Ascend reads it as the description itself; other loaders fail", ALL,
                                            _RESTORE_CONFIG),
    "quantization_method_unknown": _error("doctor does not examine this method", ALL,
                                          "use awq, bitsandbytes, compressed-tensors or ascend"),
    "quantization_field": _error("loaders reject it, or compute with wrong numbers", CONFIG_READERS, _RESTORE_CONFIG),
    "bits_wrong": _error("integers are unpacked with the wrong width", CONFIG_READERS, _RESTORE_CONFIG),
    "group_size_wrong": _error("scales are applied to the wrong groups, or have the wrong shape", CONFIG_READERS,
                               _RESTORE_CONFIG),
    "symmetric_wrong": _error("zero points are ignored, or expected but missing", CONFIG_READERS, _RESTORE_CONFIG),
    "nested_wrong": _error("transformers 4 expects tensors that are missing, or finds tensors it does not know",
                           TRANSFORMERS, _RESTORE_CONFIG),
    "list_unmatched": _warning("an exact name in the list matches no Linear of the model", CONFIG_READERS,
                               "remove or correct it"),
}  # fmt: skip

_COMPANIONS = {
    "tokenizer_missing": _error("prompts cannot be tokenized", ALL, "copy the tokenizer's files from the source"),
    "processor_missing": _error("images, audio and video cannot be processed", ALL,
                                "copy preprocessor_config.json from the source"),
    "chat_template_missing": _warning("prompts must be formatted by hand", ALL,
                                      "copy chat_template.json from the source"),
    "spk_dict_missing": _error("the full class of transformers does not load without it", TRANSFORMERS,
                               "copy spk_dict.pt from the source"),
    "spk_dict_broken": _error("the full class of transformers loads it and fails", TRANSFORMERS, _COPY_AGAIN),
    "generation_config_missing": _warning("sampling uses the library's defaults", ALL,
                                          "copy generation_config.json from the source"),
    "file_empty": _error("the file is empty", ALL, _COPY_AGAIN),
}  # fmt: skip

_SOURCE = {
    "source_unreadable": _error("the source cannot be compared", (), "give the folder of the float checkpoint"),
    "source_other_model": _error("this is not the checkpoint that was quantized, so weights are not compared", (),
                                 "give the float checkpoint that was quantized"),
    "source_config_differs": _warning("settings other than the quantization differ from the source", ALL,
                                      _RESTORE_CONFIG),
    "source_file_differs": _warning("quantization does not change this file, but it differs from the source", ALL,
                                    "copy the source's file, unless it was changed on purpose"),
    "float_changed": _error("quantization must not change this float tensor, but it differs from the source", ALL,
                            _QUANTIZE_AGAIN),
    "float_dtype_changed": _warning("a float tensor has a different dtype than in the source", ALL,
                                    "harmless if it was cast on purpose"),
    "weight_unchanged": _warning("the integers represent the source's weights exactly: the source was already rounded",
                                 ALL, "give the original float checkpoint as the source"),
    "weight_far": _error(
        "the quantized weight is far from the source's, even after accounting for folded factors", ALL,
        "wrong packing, another Linear's weight, or damaged scales: quantize again",
    ),
    "rows_far": _error("some output channels are far from the source's", ALL, _QUANTIZE_AGAIN),
    "weight_shifted": _error("on average, weights differ from the source's by a fraction of a step: zero points are"
                             " off", ALL, "convert again without changing the stored zero points"),
    "scales_reordered": _error(
        "the scales vary in another order than the source's weights do: they are flipped or permuted along an axis",
        ALL, "write the scales in the order of their rows and groups: quantize again, or convert again",
    ),
    "slope_wrong": _error(
        "the stored weights are a constant times the source's: the scales have another unit", ALL, _QUANTIZE_AGAIN,
    ),
    "scaling_inconsistent": _error(
        "the factors in these columns do not cancel the scaling before the Linear: the model's function changed", ALL,
        _QUANTIZE_AGAIN,
    ),
}  # fmt: skip

CODES: dict[str, Kind] = {
    **_FILES, **_INDEX, **_TENSORS, **_CONTENT, **_NAMES, **_CONFIG_KINDS, **_COMPANIONS, **_SOURCE,
}  # fmt: skip
