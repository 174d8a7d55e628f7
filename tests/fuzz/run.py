"""Coverage-guided fuzzing of the readers of untrusted files with atheris.

    python tests/fuzz/run.py safetensors --seconds 120

Inputs that make a target fail are written to build/fuzz/crashes. Add them to REGRESSIONS in tests/test_fuzz.py.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CRASHES = ROOT / "build" / "fuzz" / "crashes"
NAMES = ("safetensors", "index", "recipe", "samples", "config", "manifest")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="target", help=f"any of {' '.join(NAMES)} (default: all)")
    parser.add_argument("--seconds", type=int, default=60, help="per target")
    parser.add_argument("--memory", type=int, default=2048, help="MiB, the limit per target")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(NAMES):
        parser.error(f"unknown: {' '.join(sorted(unknown))}")
    CRASHES.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.targets or NAMES if not _survives(name, options.seconds, options.memory)]
    return 1 if failed else 0


def _survives(name: str, seconds: int, memory: int) -> bool:
    """Fuzz one target in a separate process and print the number of inputs. Returns whether it passed."""
    limits = [f"-max_total_time={seconds}", f"-rss_limit_mb={memory}", "-timeout=10", "-max_len=4096"]
    options = ["-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={CRASHES}/{name}-"]
    command = [sys.executable, __file__, "--inside", name, *limits, *options]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    output = done.stdout + done.stderr
    count = re.search(r"number_of_executed_units: *(\d+)", output)
    peak = re.search(r"peak_rss_mb: *(\d+)", output)
    figures = f"{count[1] if count else '?'} inputs, peak {peak[1] if peak else '?'} MiB"
    print(f"{name}: {'passed' if done.returncode == 0 else 'FAILED'}, {figures}", flush=True)
    if done.returncode:
        print(output[-6000:])
    return done.returncode == 0


def _fuzz(name: str, arguments: list[str]) -> None:
    import atheris

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import yaml  # noqa: F401  # first: atheris 2.3 on Python 3.11 instruments its scanner wrongly

    with atheris.instrument_imports(include=["msmodelslim_omni", "json"]):
        import fuzz_targets

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as parent:
        folder, corpus = Path(parent) / "folder", Path(parent) / "corpus"
        folder.mkdir()
        corpus.mkdir()
        for number, content in enumerate(fuzz_targets.SEEDS[name]):
            (corpus / str(number)).write_bytes(content)
        target = fuzz_targets.TARGETS[name]
        atheris.Setup([sys.argv[0], *arguments, str(corpus)], lambda content: target(folder, content))
        atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        _fuzz(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
