"""Evaluate a run from its checkpoints alone, or any network, on turned images.

eval.py --workdir=runs/mine [--group=cyclic16]
eval.py --predictor=my_network.py:predict --data=photos --size=64 [--group=cyclic8]
    [--adapt=confidence]
"""

import os
import signal

# While imports take their seconds; an exception could be lost in them.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import shlex
import sys
from pathlib import Path

from absl import flags

from equiadapt_jax import command_line, robustness, runs

_WORKDIR = flags.DEFINE_string("workdir", "", "where train.py left the run")
_PREDICTOR = flags.DEFINE_string("predictor", "", "file.py:name, module:name or a run's workdir")
_DATA = flags.DEFINE_string("data", "", "for --predictor: digits, a folder or tar, a TFDS dataset")
_SIZE = flags.DEFINE_integer("size", None, "for --predictor: side of the images", lower_bound=0)
_FIT = flags.DEFINE_string("fit", "", "for --predictor: pad (default), crop, stretch or none")
_ADAPT = flags.DEFINE_string(
    "adapt", "", "for --predictor: also behind a canonicalizer without training, by confidence, "
    "entropy, logit_energy, feature_norm or file.py:name"
)  # fmt: skip
_MARGIN = flags.DEFINE_float(
    "margin", None, "for --adapt: by how much a pose must beat the identity", lower_bound=0.0
)
_GROUP = flags.DEFINE_string("group", "", "whose elements turn the images; the run's or cyclic4")
_AVERAGING = flags.DEFINE_string(
    "averaging", "", "for --workdir: as in its configuration, single, top<k>, …; its own by default"
)
_RANDOM = flags.DEFINE_integer("random_angles", 4, "random turns of every image", lower_bound=0)
_SWEEP = flags.DEFINE_integer("sweep", 24, "angles around the circle, for the plot", lower_bound=0)
_SWEEP_IMAGES = flags.DEFINE_integer("sweep_images", 1000, "images of the plot", lower_bound=1)
_SPLIT = flags.DEFINE_string("split", "", "of the data; the run's test split, or test, by default")
_ROOT = flags.DEFINE_string("root", "", "for --workdir: another image folder of the same classes")
_FINETUNED = flags.DEFINE_string(
    "finetuned", "", "for --workdir: a run of the mode vanilla, for retention against it"
)
_DATA_DIR = flags.DEFINE_string("data_dir", "", "where the prepared dataset lies now")
_OUTPUT = flags.DEFINE_string("output", "", "where to write, instead of a name that tells what")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "images per batch", lower_bound=0)

_ONLY_PREDICTOR = ("data", "size", "fit", "adapt", "margin")
_ONLY_WORKDIR = ("root", "finetuned", "averaging")


def main() -> None:
    """Evaluate, write everything to one directory, print the table."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _check_flags()
    shared = {
        "random_angles": _RANDOM.value, "sweep": _SWEEP.value, "sweep_images": _SWEEP_IMAGES.value,
        "split": _SPLIT.value, "data_dir": _DATA_DIR.value, "batch_size": _BATCH_SIZE.value,
        "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip
    predictor, workdir, output = (  # shells leave ~ as it is behind =
        os.path.expanduser(flag.value) for flag in (_PREDICTOR, _WORKDIR, _OUTPUT)
    )
    if predictor:
        group = _GROUP.value or "cyclic4"
        energy = os.path.expanduser(_ADAPT.value)
        margin = _MARGIN.value or 0.0
        named = robustness.evaluation_directory(
            predictor, _DATA.value, group, _SPLIT.value, energy, margin
        )
        directory = Path(output) if output else named
        metrics, table, verdict = robustness.evaluate(
            predictor, _DATA.value, size=_SIZE.value, fit=_FIT.value, group=group,
            adapt_by=energy, margin=margin, pictures=directory, **shared,
        )  # fmt: skip
        table += f"\n\n{verdict}"
    else:
        directory = Path(
            output
            or runs.evaluation_directory(
                workdir, _GROUP.value, _SPLIT.value, _ROOT.value, _AVERAGING.value
            )
        )
        metrics, table = runs.evaluate(
            workdir, group=_GROUP.value, averaging=_AVERAGING.value, root=_ROOT.value,
            finetuned=os.path.expanduser(_FINETUNED.value), pictures=directory, **shared,
        )  # fmt: skip
    runs.write_metrics(directory / "metrics.json", metrics)
    left = ", ".join(sorted(path.name for path in directory.iterdir()))
    print(f"\n{table}\n\nLeft in {directory}: {left}.\nRead {directory / 'report.html'} first.")


def _check_flags():
    given, other = (_PREDICTOR, _ONLY_WORKDIR) if _PREDICTOR.value else (_WORKDIR, _ONLY_PREDICTOR)
    if bool(_WORKDIR.value) == bool(_PREDICTOR.value):
        raise ValueError(
            "Give one of two: --workdir=, where train.py left a run, or --predictor=, a network of "
            "your own."
        )
    for name in other:
        if flags.FLAGS[name].value not in (None, ""):
            raise ValueError(f"--{name} does not go with --{given.name}: leave it out.")


if __name__ == "__main__":
    command_line.run(main)
