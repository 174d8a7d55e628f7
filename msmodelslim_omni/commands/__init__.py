"""The verbs of the `msmodelslim` command: flags, tables and progress in the terminal. One file per verb,
plus what the verbs share: shell.py, early_checks.py, interrupts.py, live_progress.py, tables.py, examples.py.

cli.py registers them. Verbs import torch and the other rooms inside their functions, so that `--help` is fast.
May import: analysis, evaluation, doctor, quantized, run, report, compatibility, models, recipe, runtime, files, errors,
version.
Not here, on purpose: decisions. A verb parses flags, calls one function of another room, and prints the result.
"""
