"""Runs several commands in one process under torchrun, so that imports are paid for once; used by test_team.py.

Arguments: a JSON list of commands, each a list of words; a folder for the output of each rank and command.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path


def run(words: list[str], output: Path) -> None:
    """Run one command and write its output, followed by its exit code, to a file."""
    from msmodelslim_omni.cli import app
    from msmodelslim_omni.commands import shell

    code: object = 0
    with output.open("w", encoding="utf-8") as stream, redirect_stdout(stream), redirect_stderr(stream):
        shell.messages.file = shell.results.file = stream
        try:
            app(words, prog_name="msmodelslim")
        except SystemExit as end:
            code = end.code
        stream.write(f"\nexit {code}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    for number, words in enumerate(json.loads(sys.argv[1])):
        run(words, Path(sys.argv[2]) / f"rank{os.environ['RANK']}-command{number}")
