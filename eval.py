"""Evaluate a run from its checkpoints alone: eval.py --workdir=… [--group=cyclic16]."""

from pathlib import Path

from absl import flags

from equiadapt_jax import command_line, runs

_WORKDIR = flags.DEFINE_string("workdir", None, "where train.py left the run", required=True)
_GROUP = flags.DEFINE_string("group", "", "whose elements turn the images; the run's by default")
_RANDOM = flags.DEFINE_integer("random_angles", 4, "random turns of every image", lower_bound=0)
_SWEEP = flags.DEFINE_integer("sweep", 24, "angles around the circle, for the plot", lower_bound=0)
_SWEEP_IMAGES = flags.DEFINE_integer("sweep_images", 1000, "images of the plot", lower_bound=1)
_SPLIT = flags.DEFINE_string("split", "", "of the run's dataset; its test split by default")
_ROOT = flags.DEFINE_string("root", "", "another image folder or tar of the same classes")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "where the prepared dataset lies now")
_OUTPUT = flags.DEFINE_string("output", "", "where to write; <workdir>/eval by default")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "images per batch; as in the run by default")


def main() -> None:
    """Evaluate, write everything to one directory, print the table."""
    directory = _OUTPUT.value or f"{_WORKDIR.value}/eval"
    metrics, table = runs.evaluate(
        _WORKDIR.value,
        group=_GROUP.value,
        random_angles=_RANDOM.value,
        sweep=_SWEEP.value,
        sweep_images=_SWEEP_IMAGES.value,
        split=_SPLIT.value,
        root=_ROOT.value,
        data_dir=_DATA_DIR.value,
        batch_size=_BATCH_SIZE.value,
        pictures=directory,
    )
    runs.write_metrics(f"{directory}/metrics.json", metrics)
    left = ", ".join(sorted(path.name for path in Path(directory).iterdir()))
    print(f"\n{table}\n\nLeft in {directory}: {left}.")


if __name__ == "__main__":
    command_line.run(main)
