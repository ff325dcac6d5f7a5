"""The command line, `sparseout`. What it needs beyond torch is looked for before any of it is imported."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

# import name: the packages of the extra `experiments`
_EXTRA = ("sklearn", "scipy", "typer", "rich", "matplotlib", "jinja2", "accelerate", "datasets")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        tell(f'this command needs {", ".join(missing)}: pip install "sparseout[experiments]"')
        sys.exit(1)
    try:
        from sparseout_experiments.commands import invoke  # seconds, in which an interrupt is no reason for a traceback

        status = invoke(args)
    except KeyboardInterrupt:
        tell("interrupted")
        status = 130
    sys.exit(status)


def tell(sentence: str) -> None:
    """One line on standard error."""
    print(f"sparseout: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":  # for launchers that start a module on every process
    main()
