"""The verbs of the `msmodelslim` command, one function each; cli.py names them all."""
