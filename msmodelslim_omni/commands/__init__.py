"""The verbs of the `msmodelslim` command: flags, tables and progress in the terminal. One file per verb.

cli.py registers them. Verbs import torch and the other rooms inside their functions, so that `--help` is fast.
May import: every room.
Not here, on purpose: decisions. A verb parses flags, calls one function of another room, and prints the result.
"""
