"""What train.py and eval.py share: quiet libraries, one sentence for what the user got wrong."""

import sys
from collections.abc import Callable

from absl import flags, logging

_TRACEBACK = flags.DEFINE_bool("traceback", False, "show where an error arose")


def one_sentence(main: Callable[[], None]) -> Callable[[list[str]], None]:
    """A main function for `absl.app.run` that ends in one sentence and exit code 1 on bad input."""

    def run(arguments: list[str]) -> None:
        logging.set_verbosity(logging.ERROR)
        try:
            if len(arguments) > 1:
                raise ValueError(f"Unexpected argument {arguments[1]!r}: flags start with --.")
            main()
        except (ValueError, TypeError, FileNotFoundError, FloatingPointError) as error:
            if _TRACEBACK.value:
                raise
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(1)

    return run
