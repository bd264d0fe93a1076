"""What train.py and eval.py share: quiet libraries, one sentence for what the user got wrong."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging

_TRACEBACK = flags.DEFINE_bool("traceback", False, "show where an error arose")


def config_flag(default: Path) -> Any:
    """The flag --config with its settings --config.…, read from a configuration file."""
    from ml_collections import config_flags

    try:  # it looks ahead at the settings
        return config_flags.DEFINE_config_file("config", str(default), "the experiment")
    except AttributeError as error:
        _stop(_unknown_setting(error))


def run(main: Callable[[], None]) -> None:
    """Parse the flags and call `main`; bad input ends in one sentence and exit code 1."""
    app.run(lambda arguments: _one_sentence(main, arguments), flags_parser=_parse)


def _parse(arguments):
    try:
        return flags.FLAGS(arguments)
    except AttributeError as error:
        _stop(_unknown_setting(error))
    except flags.Error as error:  # with a traceback inside where a configuration file raised
        _stop(str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: "))


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
            text = f"There is no configuration file {text.rpartition(': ')[2]}."
        _stop(text)


def _unknown_setting(error):
    """What ml_collections says of a name it does not know, in one sentence."""
    names = re.findall(r"\w+", re.sub(r"\\n|Did you mean|instead of", " ", str(error)))
    nearest = f": did you mean {names[1]!r}?" if len(names) > 1 else "."
    return (
        f"Unknown setting {names[0]!r}{nearest} All settings stand with their meaning in "
        "equiadapt_jax/training/config.py."
    )


def _stop(sentence):
    print(f"Error: {sentence}", file=sys.stderr)
    sys.exit(1)
