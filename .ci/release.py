"""Build the wheel and the sdist, check their metadata, install the wheel into a new environment and quantize with it.

    python .ci/release.py [--keep]

Run by `make release` in an environment with `build` and `twine`. The version is that of msmodelslim_omni/version.py,
and the release notes are the first section of CHANGELOG.md, which must name that version. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny_omni"
# What a wheel must hold beside the modules, and what an sdist must hold to be built and tested.
IN_WHEEL = (
    "configs/qwen2_5_omni_w8a8.yaml",
    "lab_calib/calibVideos/index.jsonl",
    "py.typed",
    "recipe/recipe.schema.json",
)
IN_SDIST = ("README.md", "CHANGELOG.md", "LICENSE", "Makefile", "tests/conftest.py", "examples/demo.py")


def run(*words: object) -> str:
    """Run a command outside the checkout, so that only the installed package can be imported. Returns its stdout."""
    print("$", *words, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(list(map(str, words)), cwd=folder, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed with exit code {done.returncode}")
    return done.stdout


def release_notes() -> tuple[str, str]:
    """The version, and the section of CHANGELOG.md about it."""
    version = re.search(r'__version__ = "([^"]+)"', (ROOT / "msmodelslim_omni" / "version.py").read_text())
    sections = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert version is not None
    if len(sections) < 2 or not sections[1].startswith(version[1]):
        sys.exit(f"the first section of CHANGELOG.md is not about version {version[1]}")
    return version[1], sections[1]


def require(names: list[str], wanted: tuple[str, ...], archive: Path) -> None:
    """Exit if a file is missing in an archive."""
    if missing := [name for name in wanted if not any(entry.endswith(name) for entry in names)]:
        sys.exit(f"{archive.name} lacks {', '.join(missing)}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Build and check a release.")
    parser.add_argument("--keep", action="store_true", help="keep the environment that the wheel is installed into")
    keep = parser.parse_args().keep
    version, notes = release_notes()
    dist, env = ROOT / "dist", ROOT / "build" / "release"
    for folder in (dist, env):
        shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", dist, ROOT)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    with zipfile.ZipFile(wheel) as packed:
        require(packed.namelist(), IN_WHEEL, wheel)
    with tarfile.open(sdist) as packed_sources:
        require(packed_sources.getnames(), IN_SDIST, sdist)
    run(sys.executable, "-m", "venv", env)
    pip = (env / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "-c", ROOT / "constraints.txt", "torch", "torchvision")
    run(*pip, "-c", ROOT / "constraints.txt", wheel)
    command, out = env / "bin" / "msmodelslim", env / "out"
    assert version in run(command, "--version")
    run(command, "quant", TINY / "model", out, "--quant_type", "w4a16", "--max_samples", 4, "--device", "cpu")
    run(command, "doctor", out, "--source", TINY / "model")
    run(command, "quant", TINY / "model", env / "out-w8a8", "--quant_type", "w8a8_minmax", "--device", "cpu")
    if not keep:
        shutil.rmtree(env)
    for archive in (wheel, sdist):
        print(f"{archive.name}: {archive.stat().st_size:,} bytes, good")
    print(f"Notes of the release:\n\n## {notes}")


if __name__ == "__main__":
    main()
