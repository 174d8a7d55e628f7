"""Output formats: write the files of a quantized checkpoint, and read them back.

A format is one module that implements `Format` (format.py), plus one line in the table of registry.py. shards.py writes
the files of every format.
May import: numerics, storage, files, errors.
Not here: models and processors. A format sees only names, schemes and tensors.
"""

from __future__ import annotations

from .ascend import DESCRIPTION_FILE, scale_bias
from .bitsandbytes import NF4_NESTED, NF4_PARTS, NF4_STATE, nf4_layout, nf4_linear
from .ct_nvfp4 import nvfp4_stored_scales, unpack_e2m1
from .gguf_blocks import BLOCK as GGUF_BLOCK
from .gguf_blocks import BLOCK_BYTES, block_loss, block_type, pack_blocks
from .job import FLOAT, OutLinear, OutputJob, OutTensor
from .kv_cache import SCALES as CACHE_SCALES
from .kv_cache import cache_shapes, cache_tensors, declared_cache, stored_scales
from .nibbles import BYTES_PER_WORD, unpack_bytes, unpack_gemm, unpack_plain, unpack_row_pairs
from .registry import FORMATS
from .shards import Output, format_tensors, output_files, write_json
from .stored import PartFault, StoredLinear

__all__ = [
    "BLOCK_BYTES",
    "BYTES_PER_WORD",
    "CACHE_SCALES",
    "DESCRIPTION_FILE",
    "FLOAT",
    "FORMATS",
    "GGUF_BLOCK",
    "NF4_NESTED",
    "NF4_PARTS",
    "NF4_STATE",
    "OutLinear",
    "OutTensor",
    "Output",
    "OutputJob",
    "PartFault",
    "StoredLinear",
    "block_loss",
    "block_type",
    "cache_shapes",
    "cache_tensors",
    "declared_cache",
    "format_tensors",
    "nf4_layout",
    "nf4_linear",
    "nvfp4_stored_scales",
    "output_files",
    "pack_blocks",
    "scale_bias",
    "stored_scales",
    "unpack_bytes",
    "unpack_e2m1",
    "unpack_gemm",
    "unpack_plain",
    "unpack_row_pairs",
    "write_json",
]
