"""The shipped methods on a real language model as the decoder (benchmarks/real_language.py). Downloads packages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from command import command, quant

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "benchmarks" / "recipes"
sys.path.insert(0, str(ROOT / "benchmarks"))

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model, the texts, and the packages they come from."""
    pytest.importorskip("gguf")
    import real_language

    folder = tmp_path_factory.mktemp("real")
    real_language.write_model(folder / "packages", folder / "model", "omni", dithered=False, layers=None)
    real_language.write_texts(folder / "packages", folder / "model", folder / "texts", samples=160)
    return {name: folder / name for name in ("packages", "model", "texts")}


def test_thinker_has_the_logits_of_the_language_model(folders: dict[str, Path]) -> None:
    import real_language
    from transformers import PreTrainedTokenizerFast, Qwen2_5OmniThinkerForConditionalGeneration
    from transformers.models.llama import LlamaForCausalLM

    file = folders["packages"] / real_language.GGUF_FILE
    llama = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folders["model"], dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folders["model"] / "tokenizer.json"))
    line = (folders["texts"] / "heldout" / "index.jsonl").read_text(encoding="utf-8").splitlines()[0]
    ids = torch.tensor([tokenizer.encode(json.loads(line)["text"])])
    with torch.inference_mode():
        exact = llama(ids).logits
        logits = thinker(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(logits[..., : exact.shape[-1]], exact, rtol=0, atol=1e-4)


def kl(folders: dict[str, Path], out: Path, *flags: object) -> float:
    """KL of the model quantized with 16 samples, on 24 held-out passages."""
    quant(folders["model"], out, "--dataset", folders["texts"] / "calib", "--max_samples", 16, *flags).done()
    words = ("--float", folders["model"], "--quant", out, "--dataset", folders["texts"] / "heldout")
    report = command("eval", *words, "--max_samples", 24, "--device", "cpu", "--json").done().json
    return float(report["overall"]["kl_mean"]["value"])


def test_w8a8(folders: dict[str, Path], tmp_path: Path) -> None:
    """Measured: 0.0131; plain rounding 0.027 on other passages."""
    assert kl(folders, tmp_path / "out", "--quant_type", "w8a8", "--save_format", "compressed_tensors") < 0.016


def test_w4a16(folders: dict[str, Path], tmp_path: Path) -> None:
    """Measured: 0.166; plain rounding 0.34 on other passages."""
    assert kl(folders, tmp_path / "out", "--config_path", RECIPES / "w4a16_g64.yaml") < 0.2
