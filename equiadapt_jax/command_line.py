"""What train.py and eval.py share: quiet libraries, one sentence for what the user got wrong."""

import contextlib
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, call again
INTERRUPTED = 130  # what shells report of SIGINT

_TRACEBACK = flags.DEFINE_bool("traceback", False, "show where an error arose")
_HELP = re.compile(r"--?(config(?:\.\w+)*)=help")


def config_flag(default: Path) -> Any:
    """The flag --config with its settings --config.…, read from a configuration file."""
    from ml_collections import config_flags

    try:  # it looks ahead at the settings
        return config_flags.DEFINE_config_file("config", str(default), "the experiment")
    except Exception as error:
        _stop(_of_configuration(error))


def settings_of(flag: Any) -> dict[str, Any]:
    """The settings of the flag --config, as `flags.FLAGS["config"]` has it.

    Where --config.canonicalizer or --config.predictor.name chooses another network than the file
    does, those of the file's options that it has not are left out; options given as flags stay.
    Where --config.group alone does, from a finite group to so2 or o2, the canonicalizer is
    steerable.
    """
    from ml_collections import config_flags

    from equiadapt_jax.training.build import canonicalizer_for, fitting_options
    from equiadapt_jax.training.config import NAMED_BY, network_name

    values = flag.value.copy_and_resolve_references()
    given = config_flags.get_override_values(flag)
    if "group" in given and not {"canonicalizer", "scorer.refine"} & set(given):
        values.canonicalizer = canonicalizer_for(
            values.group, values.canonicalizer, values.scorer.refine
        )
    before = flag.parser.parse(config_flags.get_config_filename(flag))
    for role in NAMED_BY:
        settings, name = values[role], network_name(values, role)
        if name == network_name(before, role):
            continue
        prefix = f"{role}.options."
        asked = {name.removeprefix(prefix) for name in given if name.startswith(prefix)}
        options = settings.options.to_dict()
        kept = fitting_options(role, name, options)
        settings.options = kept | {option: options[option] for option in asked}
    return values.to_dict()


def take_help() -> list[str]:
    """The settings that --config.…=help asks about, taken out of the arguments."""
    asked = [match[1] for a in sys.argv[1:] if (match := _HELP.fullmatch(a))]
    sys.argv[1:] = [a for a in sys.argv[1:] if not _HELP.fullmatch(a)]
    return asked


def heed_signals(stop: Callable[..., None]) -> None:
    """Let SIGTERM and Ctrl-C ask to stop; a second Ctrl-C ends the program at once."""

    def interrupted(number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nStopping; press Ctrl-C again to stop without saving.", file=sys.stderr)
        stop(number, frame)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, interrupted)


def run(main: Callable[[], None]) -> None:
    """Parse the flags and call `main`; bad input ends in one sentence and exit code 1.

    A run that was asked to stop exits with the code `STOPPED`, one that Ctrl-C ended at once with
    `INTERRUPTED`.
    """
    sys.unraisablehook = _unraisable
    warnings.formatwarning = lambda message, *_: f"Warning: {message}\n"  # type: ignore[assignment]
    app.run(lambda arguments: _one_sentence(main, arguments), flags_parser=_parse)


def _parse(arguments):
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:  # with a traceback inside where a configuration file raised
        _stop(str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: "))
    except Exception as error:
        _stop(_of_configuration(error))


def _one_sentence(main, arguments):
    logging.set_verbosity(logging.ERROR)
    try:
        if len(arguments) > 1:
            raise ValueError(f"Unexpected argument {arguments[1]!r}: flags start with --.")
        main()
    except KeyboardInterrupt as interrupt:
        _end(interrupt)
    except ImportError as error:  # of a module of C that was interrupted while it was loaded
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        _end(error.__cause__)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if _TRACEBACK.value:
            raise
        _stop(_plain(error))


def _end(interrupt):
    """Say how a signal ended the program, and end it.

    Not by an exception: JAX, interrupted while it compiles, can crash when Python clears up.
    """
    asked = bool(interrupt.args)  # not so where Ctrl-C itself raised
    sentence = f"{interrupt} Continue with --resume." if asked else (
        "Error: stopped at once; what was saved before is whole."
    )  # fmt: skip
    with contextlib.suppress(OSError):  # nobody reads any more
        print(sentence, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(STOPPED if asked else INTERRUPTED)


def _unraisable(lost):
    """Heed an interrupt in a callback of the garbage collector, where Python would drop it."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        _end(lost.exc_value or KeyboardInterrupt())
    sys.__unraisablehook__(lost)


def _of_configuration(error):
    """What is wrong: the configuration's file, something in it, or the name of a setting."""
    text = _plain(error)
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.name == "get_config"]
    if inside and not isinstance(error, ValueError):
        at = f"{inside[-1].filename}, line {inside[-1].lineno}"
        return f"{at}, raised {type(error).__name__}: {text}"
    return _unknown_setting(text) if isinstance(error, AttributeError | KeyError) else text


def _plain(error):
    """What an error says, on one line."""
    text = " ".join(str(error).split())
    if text.startswith("Configuration is not available"):  # ml_collections, at length
        return f"There is no configuration file {text.rpartition(': ')[2]}."
    return text


def _unknown_setting(text):
    """What ml_collections says of a name it does not know, in one sentence."""
    names = re.findall(r"\w+", re.sub(r"\\n|Did you mean|instead of", " ", text))
    nearest = f": did you mean {names[1]!r}?" if len(names) > 1 else "."
    return f"Unknown setting {names[0]!r}{nearest} train.py --explain prints them all."


def _stop(sentence):
    print(f"Error: {sentence}", file=sys.stderr)
    sys.exit(1)
