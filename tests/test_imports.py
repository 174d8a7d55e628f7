"""Who may import whom, as a table; who names devices; and what stays unloaded until it is needed."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import msmodelslim_omni

PACKAGE = Path(msmodelslim_omni.__file__).parent
MODULES = {
    ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# Module, or `folder.*`, -> what of ours it may import. A folder's modules may also import each other.
BASIS = {"errors", "scheme"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "scheme": set(),
    "resources": set(),
    "digests": set(),
    "aside": set(),
    "read_ahead": {"untrusted"},
    "untrusted": set(),
    "progress": set(),
    "budget": {"errors"},
    "patterns": {"errors"},
    "device": {"errors"},
    "packing": set(),
    "team": {"device", "errors", "packing"},
    "nf4": {"errors"},
    "arithmetic": BASIS | {"nf4"},
    "recipe_yaml": {"errors"},
    "recipe_faults": {"errors", "recipe_yaml"},
    "recipe": {"errors", "recipe_faults", "recipe_yaml", "resources", "untrusted"},
    "media": {"errors"},
    "placed_file": set(),
    "safetensors_io": {"errors", "placed_file", "untrusted"},
    "checkpoint": {"errors", "safetensors_io", "untrusted"},
    "models.*": {"errors", "checkpoint", "untrusted"},
    "gram": {"team"},
    "background": set(),
    "fidelity": set(),
    "capture": {"budget", "errors", "gram", "models.spec", "team"},
    "calibration": {"digests", "errors", "media", "models.spec", "resources", "untrusted"},
    "sample_store": {"models.spec", "safetensors_io"},
    "processors.*": BASIS | {"arithmetic", "capture", "device", "gram", "models.spec", "recipe", "team"},
    "formats.*": BASIS | {"arithmetic", "aside", "nf4", "safetensors_io", "untrusted"},
    "admission": {"checkpoint", "errors", "formats.ascend", "models", "models.spec"},
    "plan": BASIS
    | {"admission", "budget", "checkpoint", "formats", "models.spec", "nf4", "patterns", "processors", "recipe"}
    | {"recipe_yaml"},
    "assembly": BASIS | {"arithmetic", "plan", "formats.job", "safetensors_io"},
    "outputs": {"formats", "formats.job", "formats.shards", "workspace"},
    "run_memory": {"models.spec"},
    "report": {"checkpoint", "formats.shards", "models.spec", "run_memory"},
    "peak_memory": {"budget", "capture", "errors", "gram", "models.spec", "plan"},
    "forecast": {
        "assembly",
        "budget",
        "calibration",
        "formats",
        "formats.shards",
        "peak_memory",
        "plan",
        "run_memory",
        "summary",
    },
    "workspace": {"errors", "checkpoint", "digests", "formats.shards", "report"},
    "emulation": {"arithmetic", "models.spec"},
    "judging": {"arithmetic", "capture", "models.spec", "recipe", "team"},
    "stream": BASIS
    | {"arithmetic", "budget", "calibration", "capture", "device", "judging", "models.spec", "plan", "progress"}
    | {"peak_memory", "sample_store", "team"},
    "measure": {"arithmetic", "capture", "models.spec", "plan", "processors.work", "report", "stream"},
    "summary": {"", "device", "formats.job", "models.spec", "plan", "progress", "report", "run_memory", "stream"},
    "inspection": {
        "admission",
        "errors",
        "checkpoint",
        "formats",
        "formats.ascend",
        "models",
        "models.spec",
        "run_memory",
        "safetensors_io",
    },
    "quantized": BASIS
    | {"admission", "arithmetic", "checkpoint", "formats", "formats.ascend", "formats.awq", "formats.bitsandbytes"}
    | {"formats.compressed_tensors"}
    | {"formats.job", "formats.stored", "models", "models.spec", "safetensors_io"},
    "export": BASIS
    | {"assembly", "checkpoint", "device", "documents", "formats", "formats.job", "formats.shards", "models.running"}
    | {"models.spec", "outputs", "progress", "quantized", "recipe", "report", "safetensors_io", "summary", "workspace"},
    "report_html.*": {"fidelity", "models.spec", "report"},
    "model_card": {"aside", "checkpoint", "eval_report", "fidelity", "models.spec", "report"},
    "documents": {"aside", "errors", "fidelity", "model_card", "models.spec", "processors.work", "progress", "report"}
    | {"report_html", "untrusted"},
    "generate": BASIS
    | {"arithmetic", "calibration", "checkpoint", "device", "formats.job", "models", "models.running", "models.spec"}
    | {"progress", "quantized", "report", "safetensors_io"},
    "doctor.*": BASIS
    | {"arithmetic", "checkpoint", "formats", "formats.ascend", "formats.bitsandbytes", "formats.nibbles", "models"}
    | {"models.spec", "nf4", "safetensors_io", "untrusted", "workspace"},
    "scoring": set(),
    "bootstrap": {"fidelity"},
    "comparable": {"checkpoint", "errors", "generate"},
    "side_by_side": {
        "arithmetic",
        "background",
        "budget",
        "calibration",
        "capture",
        "checkpoint",
        "device",
        "errors",
        "fidelity",
    }
    | {"generate", "models.spec", "progress", "quantized", "safetensors_io", "sample_store", "scoring", "emulation"},
    "figures": {"bootstrap", "fidelity", "models.spec", "scoring", "side_by_side"},
    "logits": {"device", "errors", "figures", "generate", "models.spec", "progress", "safetensors_io", "scoring"}
    | {"side_by_side"},
    "eval_report": {"aside", "checkpoint", "errors", "fidelity", "formats.shards", "models.spec", "report"},
    "evaluate": {"calibration", "checkpoint", "comparable", "device", "documents", "errors", "eval_report", "fidelity"}
    | {"figures", "generate", "logits", "models.spec", "progress", "quantized", "side_by_side", "summary"},
    "terminal": {"progress", "device"},
    "allocation": set(),
    "sensitivity": BASIS
    | {"arithmetic", "calibration", "capture", "device", "emulation", "measure", "models.spec", "plan", "processors"}
    | {"processors.work", "progress", "stream"},
    "mixed_recipe": {"scheme"},
    "holdout": {"calibration", "errors"},
    "analysis": {"fidelity", "formats.shards", "mixed_recipe", "models.spec", "report", "sensitivity"},
    "proposal": {"allocation", "assembly", "checkpoint", "formats", "formats.job", "formats.shards", "mixed_recipe"}
    | {"models.spec", "plan", "recipe", "sensitivity"},
    "rounds": {"analysis", "evaluate", "mixed_recipe", "pipeline", "progress", "proposal", "report", "sensitivity"},
    "analyze": {"analysis", "calibration", "checkpoint", "device", "errors", "holdout", "mixed_recipe", "models"}
    | {"models.spec", "preparation", "progress", "proposal", "report", "rounds", "sensitivity", "stream", "summary"}
    | {"workspace"},
    "preparation": BASIS
    | {
        "admission",
        "calibration",
        "checkpoint",
        "device",
        "digests",
        "forecast",
        "models",
        "models.spec",
        "plan",
        "progress",
    }
    | {"peak_memory", "recipe", "summary", "team"},
    "layers": {"arithmetic", "background", "device", "emulation", "judging", "measure", "plan", "preparation"}
    | {"processors", "processors.work", "progress", "safetensors_io", "stream"},
    "pipeline": {m for m in MODULES if not m.startswith("commands")}
    - {"cli", "__main__", "evaluate", "terminal"}
    - {"analysis", "analyze", "proposal", "rounds", "sensitivity"},
    "commands.*": {
        "analysis",
        "analyze",
        "budget",
        "errors",
        "recipe",
        "pipeline",
        "preparation",
        "progress",
        "read_ahead",
        "inspection",
        "report",
        "team",
        "terminal",
        "workspace",
        "export",
        "generate",
        "evaluate",
        "eval_report",
    }
    | {"doctor"},
    "cli": {m for m in MODULES if m.startswith("commands")},
    "": {"errors", "recipe", "pipeline"},  # the package itself
    "__main__": {"cli"},
}

# Heavy or optional libraries that may only be imported inside functions.
LAZY = {
    "transformers", "torchvision", "qwen_omni_utils", "av", "PIL", "soxr", "librosa", "torch_npu", "decord",
    "matplotlib", "jinja2",
}  # fmt: skip


def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    if is_type_checking(node):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from running_nodes(child)


def own_imports(module: str) -> set[str]:
    """Modules of ours that a module imports, also inside functions."""
    found = set()
    folder = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    for node in running_nodes(parsed(module)):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = [part for part in folder if part][: len(folder) - node.level + 1]
        target = ".".join([*base, *(node.module.split(".") if node.module else [])])
        for alias in node.names:
            inner = f"{target}.{alias.name}".lstrip(".")
            if inner in MODULES:
                found.add(inner)
            elif target or alias.name != "__version__":
                found.add(target)
    return found


def row_of(module: str) -> str:
    folder = module.split(".")[0]
    return f"{folder}.*" if f"{folder}.*" in MAY_IMPORT else module


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_in_the_table(module: str) -> None:
    row = row_of(module)
    assert row in MAY_IMPORT, f"{module} has no row: decide what it may import"
    siblings = {m for m in MODULES if row.endswith(".*") and row_of(m) == row}
    surplus = own_imports(module) - MAY_IMPORT[row] - siblings
    assert not surplus, f"{module} must not import {sorted(surplus)}"


def test_the_reader_of_imports_sees_them() -> None:
    assert own_imports("processors.smooth") >= {"arithmetic", "capture", "models.spec", "processors.work"}
    assert own_imports("commands.quant") >= {"commands.shell", "pipeline"}  # those inside functions too
    assert "checkpoint" not in own_imports("models.spec")  # for type checkers only
    assert own_imports("") == {"errors", "recipe", "pipeline"}  # the last one inside a function
    formats = {"ascend", "awq", "bitsandbytes", "compressed_tensors", "job"}
    assert own_imports("formats") == {f"formats.{name}" for name in formats}


def test_nobody_imports_ours_by_its_full_name() -> None:
    for module in MODULES:
        for node in ast.walk(parsed(module)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not any(name.startswith("msmodelslim_omni") for name in names), module


def top_level_imports(module: str) -> set[str]:
    found = set()
    for node in parsed(module).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_imported_inside_functions(module: str) -> None:
    assert not top_level_imports(module) & LAZY


@pytest.mark.parametrize(
    "module",
    ["recipe", "errors", "patterns", "scheme", "resources", "models.spec", "cli", "commands.shell", "progress"],
)
def test_no_torch_at_the_top(module: str) -> None:
    assert "torch" not in top_level_imports(module)


# --- the words that name devices -----------------------------------------------------------------------------

DEVICE_WORDS = re.compile(r"(?<![a-z])(cuda|npu|torch_npu)(?![a-z])", re.IGNORECASE)


def docstrings(tree: ast.Module) -> set[int]:
    """Ids of the docstrings' nodes: they may explain."""
    holders = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    first = [holder.body[0] for holder in holders if holder.body]
    return {id(node.value) for node in first if isinstance(node, ast.Expr)}


def help_texts(tree: ast.Module) -> set[int]:
    """Ids of strings given as `help=`: there the words are values that a user types."""
    texts = [k.value for k in ast.walk(tree) if isinstance(k, ast.keyword) and k.arg == "help"]
    return {id(node) for text in texts for node in ast.walk(text)}


def words(module: str) -> Iterator[str]:
    """Identifiers and string constants of a module."""
    tree = parsed(module)
    allowed = docstrings(tree) | (help_texts(tree) if module.startswith("commands.") else set())
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "module"):
            if isinstance(value := getattr(node, field, None), str):
                yield value
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in allowed:
            yield node.value


@pytest.mark.parametrize("module", [module for module in MODULES if module != "device"])
def test_only_device_names_devices(module: str) -> None:
    assert not [word for word in words(module) if DEVICE_WORDS.search(word)]


def test_device_does_name_them() -> None:
    found = {match[1].lower() for word in words("device") for match in DEVICE_WORDS.finditer(word)}
    assert found == {"cuda", "npu", "torch_npu"}


# --- what must never be --------------------------------------------------------------------------------------


def test_no_catch_all_modules() -> None:
    assert not {path.stem for path in MODULES.values()} & {"utils", "common", "helpers", "misc"}


def test_no_fault_is_swallowed() -> None:
    for module in MODULES:
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                does_nothing = all(isinstance(statement, ast.Pass) for statement in node.body)
                broad = caught in ("Exception", "BaseException", "everything")
                assert not (does_nothing and broad), f"{module}:{node.lineno}"


def test_no_pickle_is_loaded() -> None:
    for module in MODULES:
        tree = parsed(module)
        assert not top_level_imports(module) & {"pickle", "marshal", "shelve"}
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"torch.load", "yaml.load", "yaml.unsafe_load", "eval", "exec"}, module


# --- what a process loads ------------------------------------------------------------------------------------

SHOW = "import sys; print(*sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"


def loaded_by(code: str, *arguments: str) -> tuple[set[str], str, float]:
    """Top-level modules in memory after `code`, its stdout, and the CPU seconds it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = f"try:\n    {code}\nexcept SystemExit as stop:\n    assert not stop.code\n{SHOW}"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True, text=True, check=True, cwd=PACKAGE.parent,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return set(done.stderr.split("\n")[-2].split()), done.stdout, seconds


@pytest.mark.parametrize("module", ["cli", "recipe", "errors", "patterns", "scheme"])
def test_importing_without_torch(module: str) -> None:
    modules, _, _ = loaded_by(f"import msmodelslim_omni.{module}")
    assert "msmodelslim_omni" in modules
    assert not modules & {"torch", "transformers", "numpy", *LAZY}


MAIN = "from msmodelslim_omni.cli import main; main()"


@pytest.mark.parametrize(
    ("arguments", "shows"),
    [
        (["--help"], "recipes"),
        (["quant", "--help"], "--model_path"),
        (["analyze", "--help"], "--target_size"),
        (["export", "--help"], "--save_format"),
        (["generate", "--help"], "--speech"),
        (["eval", "--help"], "--float"),
        (["recipes", "list"], "qwen2_5_omni_w8a8"),
        (["recipes", "show", "qwen2_5_omni_w8a8"], "apiversion"),
        (["recipes", "validate", "qwen2_5_omni_w8a8_minmax"], "valid"),
        (["recipes", "schema"], "additionalProperties"),
    ],
)
def test_commands_that_answer_at_once(arguments: list[str], shows: str) -> None:
    modules, out, seconds = loaded_by(MAIN, *arguments)
    assert shows in out
    assert not modules & {"torch", "transformers", "numpy", *LAZY}
    assert seconds < 3  # of the processor, on a machine that may be busy; alone it takes about half a second


def test_the_pipeline_needs_no_media_libraries() -> None:
    modules, _, _ = loaded_by("import msmodelslim_omni.pipeline")
    assert "torch" in modules
    assert not modules & LAZY


@pytest.mark.full
@pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_the_models_classes_need_no_scikit_learn() -> None:
    code = "from msmodelslim_omni.models.qwen2_5 import library; library().Qwen2_5OmniForConditionalGeneration"
    modules, _, _ = loaded_by(code)
    assert "transformers" in modules
    assert "sklearn" not in modules


def test_public_names() -> None:
    code = "import msmodelslim_omni as m; print(*m.__all__); print([getattr(m, n).__name__ for n in m.__all__[:2]])"
    modules, out, _ = loaded_by(code)
    assert "torch" not in modules
    for name in ("quantize", "load_recipe", "Recipe", "QuantError"):
        assert name in out
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = msmodelslim_omni.nothing
    assert callable(msmodelslim_omni.quantize)
