"""The entry point of the `msmodelslim` command and of `python -m msmodelslim_omni`.

It imports nothing before Ctrl-C is set to end the process silently: the imports take a quarter of a second.
"""

import signal


def main() -> None:
    """Run the command line; see cli.py."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not ignored, as in a background job
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main as run

    run()


if __name__ == "__main__":
    main()
