"""Every kind of finding: its level, why it matters and to which runtimes, and what to do. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VLLM, ASCEND, AUTOAWQ = "vLLM", "vLLM-Ascend", "AutoAWQ"
TF4, TF5 = "transformers 4.57", "transformers 5.x"
TRANSFORMERS = (TF4, TF5)
ALL = (VLLM, ASCEND, TF4, TF5, AUTOAWQ)
CONFIG_READERS = (VLLM, TF4, TF5, AUTOAWQ)

_COPY = "copy or fetch the file again"
_AGAIN = "quantize again"
_CONFIG = "restore this part of config.json from the source, or quantize again"


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
    "no_weights": _error("there is nothing to load", ALL, "give the folder that holds the safetensors files"),
    "file_truncated": _error("the file ends before its tensors do", ALL, _COPY),
    "file_trailing_bytes": _error("bytes behind the last tensor: readers refuse the file", ALL, _COPY),
    "file_broken": _error("its header cannot be used, so that nothing in it can be loaded", ALL, _COPY),
    "file_unreadable": _error("it cannot be opened", ALL, "check the file's rights and the disk"),
    "json_broken": _error("loaders read this file and end with an error", ALL, _COPY),
    "unfinished_run": _error(
        "a run was stopped here; the checkpoint beside it may be partly of that run", ALL,
        "run the same command again: it goes on where it stopped; or delete this if the checkpoint is whole",
    ),
    "pickle_weights": _warning(
        "weights in pickle files are not examined, and a loader may prefer them", TRANSFORMERS, "delete them",
    ),
    "tensor_twice": _error("a tensor stands in two files: which one is loaded is chance", ALL,
                           "delete the file that is left over from another run"),
    "check_failed": _error("this check could not be finished, so that nothing is known of what it covers", ALL,
                           "look at the file named, and report this"),
}  # fmt: skip

_INDEX = {
    "index_missing": _error("without an index, loaders of several shards find none of them", (VLLM, *TRANSFORMERS),
                            "restore the index file, or quantize again"),
    "index_no_weight_map": _error("transformers reads weight_map and fails", TRANSFORMERS,
                                  "write {metadata: {total_size}, weight_map: {tensor: file}}"),
    "index_names_absent_shard": _error("loaders open every file that the index names", (VLLM, *TRANSFORMERS),
                                       "fetch the missing file again"),
    "index_names_absent_tensor": _error("the tensor is promised and not in that file", TRANSFORMERS, _COPY),
    "index_wrong_shard": _error("transformers looks for the tensor in the wrong file", TRANSFORMERS,
                                "correct the entry of the index"),
    "index_lacks_tensor": _error("transformers never loads it: the weight stays random, without an error",
                                 TRANSFORMERS, "add it to the index"),
    "shard_unlisted": _error("some loaders take every file of the folder, others only the index's", ALL,
                             "delete the file if it is left over from another run; else list it"),
    "total_size_wrong": _warning("index and shards are of different versions, or memory is planned wrongly",
                                 TRANSFORMERS, "correct metadata.total_size"),
    "index_stale": _warning("a second index, for files that are not there", (VLLM, *TRANSFORMERS), "delete it"),
}  # fmt: skip

_TENSORS = {
    "tensor_missing": _error("loading fails, or the weight stays random without an error", ALL, _AGAIN),
    "linear_incomplete": _error(
        "a quantized Linear lacks one of its tensors: loading fails, or the product is garbage without an error", ALL,
        _AGAIN,
    ),
    "tensor_unexpected": _error("vLLM refuses names that the model has not", (VLLM, ASCEND), "rename or remove it"),
    "prefix_dropped": _error(
        "names must begin as the whole model's do: vLLM's mapper and the full class find none of these",
        (VLLM, ASCEND, *TRANSFORMERS), "save the whole model's names, e.g. thinker. before those of an Omni's thinker",
    ),
    "part_missing": _warning("no speech can be made with this checkpoint, though its config offers it", TRANSFORMERS,
                             "set enable_audio_output to false, or quantize again from a whole checkpoint"),
    "tensor_shape": _error("loading fails", ALL, _AGAIN),
    "tensor_dtype": _error("loading fails, or numbers are cast to something else without an error", ALL, _AGAIN),
    "form_foreign": _error("the tensors are of another format than the one declared", ALL,
                           "declare the right format, or quantize again"),
    "float_not_finite": _error("every output becomes NaN", ALL, "fetch the source again and quantize again"),
}  # fmt: skip

_CONTENT = {
    "scale_nan": _error("every output of this Linear becomes NaN: the calibration went wrong", ALL, _AGAIN),
    "scale_inf": _error("outputs become Inf or NaN: the calibration went wrong", ALL, _AGAIN),
    "scale_zero": _error("a zero scale wipes these channels out: often weights that were never loaded", ALL, _AGAIN),
    "scale_negative": _warning("kernels multiply by it, but no quantizer writes it: often a misread file", ALL,
                               "compare with the source: doctor --source"),
    "scale_denormal": _error("accelerators flush such numbers to zero, which wipes these channels out", ALL, _AGAIN),
    "scale_subnormal": _warning("float16 holds it with few bits; kernels that flush subnormals lose the group",
                                (VLLM, AUTOAWQ), "look whether these channels matter: doctor --source"),
    "offset_not_zero": _error("vLLM-Ascend loads the offset and leaves it out of the product", (ASCEND,),
                              "quantize symmetrically"),
    "integers_all_zero": _error("the whole weight is zero", ALL, _AGAIN),
    "integers_constant": _error("every integer is the same: the file was not filled", ALL, _AGAIN),
    "row_constant": _error("an output channel has one integer throughout, which no weight is", ALL, _AGAIN),
    "row_zero": _warning("output channels are zero throughout: dead in the source, or lost", ALL,
                         "compare with the source: doctor --source"),
    "saturated": _warning("many integers lie at the ends of their range: the scales are too small", ALL,
                          "compare with the source: doctor --source; quantize again"),
    "zero_point_shifted": _error(
        "integers and zero points differ by a constant on average: one of them is off, e.g. by GPTQ's minus one", ALL,
        "convert with the zero points stored as they are",
    ),
    "zero_point_unrelated": _error(
        "zero points do not belong to the integers beside them: a wrong nibble order or a wrong axis", ALL,
        "pack both in the order of the format",
    ),
    "nf4_state_wrong": _error("bitsandbytes cannot unpack the weight, or unpacks other numbers", TRANSFORMERS, _AGAIN),
    "weight_shape_wrong": _error("weight_shape holds another shape than the weight has", (VLLM, *TRANSFORMERS),
                                 _AGAIN),
}  # fmt: skip

_NAMES = {
    "loader_expects_quantized": _error(
        "the loader builds a quantized module for a float Linear: an error, or random weights without one", ALL,
        "add the Linear to the list of what is left float (see `what`)",
    ),
    "loader_expects_float": _error(
        "the loader builds a float module for a quantized Linear: integers are taken for weights, often without an"
        " error", ALL, "take the Linear off the list of what is left float",
    ),
    "loader_expects_other_bits": _error(
        "of several groups the loader takes another one for this Linear than it is stored by: an error, or garbage",
        CONFIG_READERS, "name the Linear in the targets of its own group",
    ),
    "autoawq_cannot_say": _warning(
        "AutoAWQ's list knows names within a layer only, not one layer from another; the others load it",
        (AUTOAWQ,), "leave it float in all layers or none if AutoAWQ is to load it",
    ),
    "fused_split": _error(
        "runtimes fuse q, k, v and gate, up, and take one form of all parts", (VLLM, ASCEND),
        "quantize all parts of the group or none",
    ),
    "tower_quantized": _warning(
        "only Linears of decoder layers are expected to be quantized; towers, lm_head and speech parts lose quality,"
        " and few loaders can read them so", ALL, "leave it float",
    ),
    "pattern_refused": _warning("such a pattern can take hours to match; what it covers is not checked", ALL,
                                "write it simpler"),
    "description_missing_entry": _error("vLLM-Ascend asks for it and ends with a KeyError", (ASCEND,),
                                        "add the entry: FLOAT for what is float"),
    "description_incomplete": _warning("every tensor has its entry in msModelSlim's output", (ASCEND,),
                                       "add the entry"),
    "description_wrong_type": _error("vLLM-Ascend builds the module that the description says, not what is stored",
                                     (ASCEND,), "correct the entry"),
    "description_unsupported": _error("vLLM-Ascend has no Linear of this type", (ASCEND,),
                                      "quantize to W8A8_DYNAMIC"),
    "description_stale": _warning("the description names tensors that are not there: it is of another run",
                                  (ASCEND,), "use the description written with these weights"),
}  # fmt: skip

_CONFIG_KINDS = {
    "config_missing": _error("nothing can be loaded without it", ALL, "copy config.json from the source"),
    "config_foreign": _error("this is no model that this tool quantizes; names and shapes are not checked", ALL,
                             "give a checkpoint of Qwen2.5-Omni or Qwen2.5-VL"),
    "config_thinker_only": _error(
        "vLLM knows only the whole model's architecture and reads hf_config.thinker_config", (VLLM, ASCEND),
        "keep the source's whole config.json, also when talker and token2wav are left out",
    ),
    "config_architecture": _error("vLLM chooses the model by it and does not know this one", (VLLM, ASCEND), _CONFIG),
    "config_part_missing": _error("the model cannot be built", ALL, _CONFIG),
    "config_unbuildable": _error("transformers cannot build a model of it; names and shapes are not checked", ALL,
                                 _CONFIG),
    "not_quantized": _error("nothing in this checkpoint is quantized", ALL, _AGAIN),
    "quantization_config_missing": _error("integers are loaded as if they were float weights", CONFIG_READERS, _CONFIG),
    "quantization_config_not_in_thinker": _warning(
        "the thinker class reads it there alone; 5.x then loads integers as weights without an error", TRANSFORMERS,
        "copy it into thinker_config, or load the full class only",
    ),
    "quantization_config_only_in_thinker": _error("vLLM and the full class read the top level alone",
                                                  (VLLM, *TRANSFORMERS), "copy it to the top level"),
    "quantization_config_differs": _error("which one counts depends on the class that loads it",
                                          (VLLM, *TRANSFORMERS), "make the two the same"),
    "quantization_config_stale": _error(
        "it contradicts quant_model_description.json, which selects vLLM-Ascend's method", (ASCEND, VLLM),
        "remove it from config.json",
    ),
    "quantization_config_stray": _warning("no loader of this model reads it there", ALL, "remove it"),
    "quantization_config_no_method": _error("vLLM-Ascend takes it for the description itself, others fail", ALL,
                                            _CONFIG),
    "quantization_method_unknown": _error("this method is not examined", ALL, "use awq, compressed-tensors or ascend"),
    "quantization_field": _error("loaders refuse it, or multiply with wrong numbers", CONFIG_READERS, _CONFIG),
    "bits_wrong": _error("integers are unpacked with the wrong width", CONFIG_READERS, _CONFIG),
    "group_size_wrong": _error("scales are taken for other groups, or have the wrong shape", CONFIG_READERS, _CONFIG),
    "symmetric_wrong": _error("zero points are ignored, or asked for and not there", CONFIG_READERS, _CONFIG),
    "nested_wrong": _error("transformers 4 waits for tensors that never come, or meets unknown ones", TRANSFORMERS,
                           _CONFIG),
    "list_unmatched": _warning("an exact name of the list is no Linear of the model and covers nothing", CONFIG_READERS,
                               "remove or correct it"),
}  # fmt: skip

_COMPANIONS = {
    "tokenizer_missing": _error("no prompt can be tokenized", ALL, "copy the tokenizer's files from the source"),
    "processor_missing": _error("no image, audio or video can be prepared", ALL,
                                "copy preprocessor_config.json from the source"),
    "chat_template_missing": _warning("prompts must be written by hand", ALL, "copy chat_template.json"),
    "spk_dict_missing": _error("the full class of transformers refuses to load without it", TRANSFORMERS,
                               "copy spk_dict.pt from the source"),
    "spk_dict_broken": _error("the full class of transformers loads it and fails", TRANSFORMERS, _COPY),
    "generation_config_missing": _warning("sampling falls back to the library's defaults", ALL,
                                          "copy generation_config.json"),
    "file_empty": _error("the file has no content", ALL, _COPY),
}  # fmt: skip

_SOURCE = {
    "source_unreadable": _error("nothing can be compared", (), "give the folder of the float checkpoint"),
    "source_other_model": _error("this is not the checkpoint that was quantized; weights are not compared", (),
                                 "give the float checkpoint it was made from"),
    "source_config_differs": _warning("settings other than the quantization differ from the source", ALL, _CONFIG),
    "source_file_differs": _warning("a file that quantization has no business with is not the source's", ALL,
                                    "copy the source's, unless it was changed on purpose"),
    "float_changed": _error("a float tensor that nothing may change differs from the source", ALL, _AGAIN),
    "float_dtype_changed": _warning("a float tensor has another dtype than in the source", ALL,
                                    "harmless if it was cast on purpose"),
    "weight_unchanged": _warning("the integers stand exactly for the source's weights: the source was rounded before",
                                 ALL, "give the float checkpoint as the source"),
    "weight_far": _error("the quantized weight is not near the source's, whatever was folded into it", ALL,
                         "a wrong packing, another Linear's weight, or damaged scales: quantize again"),
    "rows_far": _error("some output channels are not near the source's", ALL, _AGAIN),
    "weight_shifted": _error("the weights differ from the source's by a constant share of a step: zero points are off",
                             ALL, "convert with the zero points stored as they are"),
    "scaling_inconsistent": _error(
        "the factors in these columns are not undone by what precedes the Linear: the model's function changed", ALL,
        _AGAIN,
    ),
}  # fmt: skip

CODES: dict[str, Kind] = {
    **_FILES, **_INDEX, **_TENSORS, **_CONTENT, **_NAMES, **_CONFIG_KINDS, **_COMPANIONS, **_SOURCE,
}  # fmt: skip
