"""Layering of the package, forbidden constructs, device names, and lazily imported libraries.

A room is a folder of the package with its files, or a file at the top of the package.
"""

from __future__ import annotations

import ast
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest

import msmodelslim_omni

PACKAGE = Path(msmodelslim_omni.__file__).parent
MODULES = {
    ".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# A room imports only rooms that come after it.
ROOMS = (
    "commands",  # includes cli.py and __main__.py
    "package",  # msmodelslim_omni/__init__.py, the public API
    "analysis",
    "evaluation",
    "doctor",
    "quantized",
    "run",
    "tuning",
    "calibration",
    "report",
    "plan",
    "processors",
    "compatibility",
    "statistics",
    "formats",
    "models",
    "recipe",
    "numerics",
    "runtime",
    "storage",
    "files",
    "errors",
    "version",
)

# Heavy or optional libraries, which must be imported inside functions.
LAZY = {
    "transformers", "torchvision", "qwen_omni_utils", "av", "PIL", "soxr", "librosa", "torch_npu", "decord",
    "matplotlib", "jinja2",
}  # fmt: skip


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def room_of(module: str) -> str:
    first = module.split(".")[0]
    return {"": "package", "cli": "commands", "__main__": "commands"}.get(first, first)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def running_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes except those under `if TYPE_CHECKING`."""
    if is_type_checking(node):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from running_nodes(child)


@cache
def own_imports(module: str, *, for_types: bool = False) -> frozenset[str]:
    """Modules of this package that a module imports, also inside functions.

    for_types: include imports under `if TYPE_CHECKING`.
    """
    imported = set()
    folder = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    nodes = ast.walk(parsed(module)) if for_types else running_nodes(parsed(module))
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = [part for part in folder if part][: len(folder) - node.level + 1]
        target = ".".join([*base, *(node.module.split(".") if node.module else [])])
        for alias in node.names:
            inner = f"{target}.{alias.name}".lstrip(".")
            imported.add(inner if inner in MODULES and not is_reexported(target, alias.name) else target)
    return frozenset(imported)


def is_reexported(package: str, name: str) -> bool:
    """Whether a package's __init__.py re-exports an object of this name, as opposed to a module of this name."""
    nodes = [node for node in parsed(package).body if isinstance(node, ast.ImportFrom) and node.module]
    return any(alias.name == name for node in nodes for alias in node.names)


# --- the order of rooms --------------------------------------------------------------------------------------


def test_every_folder_and_file_is_a_room() -> None:
    assert {room_of(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_room_imports_only_lower_rooms(module: str) -> None:
    own = ROOMS.index(room_of(module))
    above = {target for target in own_imports(module) if ROOMS.index(room_of(target)) < own}
    assert not above, f"{module} is in {ROOMS[own]} and must not import {sorted(above)}"


@pytest.mark.parametrize("module", MODULES)
def test_rooms_are_imported_by_their_package(module: str) -> None:
    """Other rooms import from a room's __init__.py, not from its files. This includes types."""
    others = {target for target in own_imports(module, for_types=True) if room_of(target) != room_of(module)}
    inner = {target for target in others if "." in target}
    assert not inner, f"{module} must import from the room itself, not from {sorted(inner)}"


def exported(room: str) -> list[str]:
    """`__all__` of a room."""
    for node in parsed(room).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def test_rooms_export_exactly_what_others_import() -> None:
    used: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module in MODULES:
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = {alias.name for alias in node.names}
                for room in imported_rooms(module, node):
                    used[room] |= names
    packages = [
        room for room in ROOMS if room in MODULES and MODULES[room].name == "__init__.py" and room != "commands"
    ]
    assert {room: set(exported(room)) for room in packages} == {room: used[room] for room in packages}


def imported_rooms(module: str, node: ast.ImportFrom) -> set[str]:
    """The room that an import statement names from outside. Empty for imports inside a room."""
    folder = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    base = [part for part in folder if part][: len(folder) - node.level + 1]
    target = ".".join([*base, *(node.module.split(".") if node.module else [])])
    return {target} if target in ROOMS and target != room_of(module) else set()


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_cycles_inside_a_room(room: str) -> None:
    """Type-only imports count, because two files that need each other's types should be one file."""
    inside = [module for module in MODULES if room_of(module) == room]
    graph = {module: own_imports(module, for_types=True) & set(inside) - {module} for module in inside}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("room", [room for room in ROOMS if room in MODULES and "." not in room])
def test_rooms_have_a_docstring(room: str) -> None:
    if MODULES[room].name == "__init__.py":
        text = ast.get_docstring(parsed(room)) or ""
        assert 3 <= len(text.splitlines()) <= 8, f"{room}/__init__.py: three to eight lines"


@pytest.mark.parametrize("room", [room for room in ROOMS if room in MODULES and "." not in room])
def test_docstring_lists_the_imported_rooms(room: str) -> None:
    if MODULES[room].name == "__init__.py":
        modules = [module for module in MODULES if room_of(module) == room and not module.startswith(("cli", "__"))]
        imported = {room_of(target) for module in modules for target in own_imports(module, for_types=True)} - {room}
        listed = re.search(r"May import: ([^.]*)\.", ast.get_docstring(parsed(room)) or "")
        assert listed is not None, f"{room}/__init__.py: no list of rooms"
        expected = ", ".join(other for other in ROOMS if other in imported) or "no other room"
        assert " ".join(listed[1].split()) == expected


def test_own_imports() -> None:
    assert own_imports("processors.smooth") >= {"numerics", "statistics", "models", "processors.work"}
    assert own_imports("commands.quant") >= {"commands.shell", "run"}  # inside functions
    assert "storage" not in own_imports("models.spec")  # for type checkers only
    assert "storage" in own_imports("models.spec", for_types=True)
    assert own_imports("") == {"errors", "recipe", "run", "version"}  # `run` inside a function
    assert own_imports("formats") >= {"formats.registry", "formats.job"}


def test_imports_of_the_package_are_relative() -> None:
    for module in MODULES:
        for node in ast.walk(parsed(module)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not any(name.startswith("msmodelslim_omni") for name in names), module


def top_level_imports(module: str) -> set[str]:
    imported = set()
    for node in parsed(module).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add((node.module or "").split(".")[0])
    return imported


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_imported_inside_functions(module: str) -> None:
    assert not top_level_imports(module) & LAZY


@pytest.mark.parametrize(
    "module",
    [
        *(m for m in MODULES if room_of(m) in ("recipe", "files", "errors", "version", "package")),
        "cli",
        "commands.shell",
        "models.spec",
        "numerics.scheme",
        "runtime.progress",
        "runtime.budget",
    ],
)
def test_no_torch_at_module_level(module: str) -> None:
    assert "torch" not in top_level_imports(module)


# --- device names --------------------------------------------------------------------------------------------

DEVICE_WORDS = re.compile(r"(?<![a-z])(cuda|npu|torch_npu)(?![a-z])", re.IGNORECASE)


def docstrings(tree: ast.Module) -> set[int]:
    """Ids of the docstrings' nodes. Docstrings may name devices."""
    holders = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    first = [holder.body[0] for holder in holders if holder.body]
    return {id(node.value) for node in first if isinstance(node, ast.Expr)}


def help_texts(tree: ast.Module) -> set[int]:
    """Ids of strings given as `help=`. Help texts name the values that a user types."""
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


# Examples of commands are help texts.
# The device module, and texts for the command line.
TELL_DEVICES = ("runtime.device", "commands.examples", "commands.completion")


@pytest.mark.parametrize("module", [m for m in MODULES if m not in TELL_DEVICES])
def test_only_the_device_module_names_devices(module: str) -> None:
    assert not [word for word in words(module) if DEVICE_WORDS.search(word)]


def test_device_module_names_devices() -> None:
    names = {match[1].lower() for word in words("runtime.device") for match in DEVICE_WORDS.finditer(word)}
    assert names == {"cuda", "npu", "torch_npu"}


# --- forbidden constructs ------------------------------------------------------------------------------------


def test_no_catch_all_modules() -> None:
    assert not {path.stem for path in MODULES.values()} & {"utils", "common", "helpers", "misc"}


def test_no_exception_is_swallowed() -> None:
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


# --- loaded modules ------------------------------------------------------------------------------------------

PRINT_MODULES = "import sys; print(*sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)"


def loaded_by(code: str, *arguments: str) -> tuple[set[str], str, float]:
    """Top-level modules that are loaded after `code`, its stdout, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit as stop:\n    assert not stop.code\n{PRINT_MODULES}"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True, text=True, check=True, cwd=PACKAGE.parent,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return set(done.stderr.split("\n")[-2].split()), done.stdout, seconds


@pytest.mark.parametrize("module", ["cli", "recipe", "errors", "files"])
def test_import_does_not_load_torch(module: str) -> None:
    modules, _, _ = loaded_by(f"import msmodelslim_omni.{module}")
    assert "msmodelslim_omni" in modules
    assert not modules & {"torch", "transformers", "numpy", *LAZY}


COMMANDS = """
    import contextlib, io, json
    from msmodelslim_omni.cli import main
    for line in sys.argv[1:]:
        sys.argv[1:] = line.split()
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            try:
                main()
            except SystemExit as stop:
                assert not stop.code
        print(json.dumps(shown.getvalue()))"""
FAST_COMMANDS = {
    "--help": "recipes",
    "quant --help": "--model_path",
    "analyze --help": "--target_size",
    "export --help": "--save_format",
    "generate --help": "--speech",
    "eval --help": "--float",
    "recipes list": "qwen2_5_omni_w8a8",
    "recipes show qwen2_5_omni_w8a8": "apiversion",
    "recipes validate qwen2_5_omni_w8a8_minmax": "valid",
    "recipes schema": "additionalProperties",
}


def test_fast_commands() -> None:
    """One after the other in a process of their own."""
    modules, out, seconds = loaded_by(COMMANDS, *FAST_COMMANDS)
    for (line, expected), shown in zip(FAST_COMMANDS.items(), out.splitlines(), strict=True):
        assert expected in json.loads(shown), line
    assert not modules & {"torch", "transformers", "numpy", *LAZY}
    assert seconds < 3  # CPU time; about 1 s on an idle machine


def test_pipeline_does_not_load_media_libraries() -> None:
    modules, _, _ = loaded_by("import msmodelslim_omni.run.pipeline")
    assert "torch" in modules
    assert not modules & LAZY


@pytest.mark.full
@pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_model_classes_do_not_load_scikit_learn() -> None:
    name = "load_transformers"
    code = f"from msmodelslim_omni.models.qwen2_5 import {name}; {name}().Qwen2_5OmniForConditionalGeneration"
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
