"""What train.py and eval.py share: quiet libraries, one sentence for what the user got wrong."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging

_TRACEBACK = flags.DEFINE_bool("traceback", False, "show where an error arose")


def config_flag(default: Path) -> Any:
    """The flag --config with its settings --config.…, read from a configuration file."""
    from ml_collections import config_flags

    try:
        return config_flags.DEFINE_config_file("config", str(default), "the experiment")
    except AttributeError as error:  # how ml_collections, which looks ahead, tells a wrong name
        name = str(error).replace("\\n", "; ").translate(str.maketrans("", "", "\"'\\"))
        _stop(f"Unknown setting --config.…{name} (all are in equiadapt_jax/training/config.py)")


def run(main: Callable[[], None]) -> None:
    """Parse the flags and call `main`; bad input ends in one sentence and exit code 1."""
    app.run(lambda arguments: _one_sentence(main, arguments))


def _one_sentence(main, arguments):
    logging.set_verbosity(logging.ERROR)
    try:
        if len(arguments) > 1:
            raise ValueError(f"Unexpected argument {arguments[1]!r}: flags start with --.")
        main()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if _TRACEBACK.value:
            raise
        text = " ".join(str(error).split())
        if text.startswith("Configuration is not available"):  # ml_collections, at length
            text = "There is no such configuration file: " + text.rpartition("No such file")[2]
        _stop(text)


def _stop(sentence):
    print(f"Error: {sentence}", file=sys.stderr)
    sys.exit(1)
