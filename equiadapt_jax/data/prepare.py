"""Prepare a dataset: python -m equiadapt_jax.data.prepare NAME [--data_dir=DIR] [--root=IMAGES]."""

import argparse
import importlib.util
import sys

from equiadapt_jax.data.datasets import OWN, check_known, open_dataset


def prepare(name: str, *, data_dir: str = "", root: str = "") -> None:
    """Download a TFDS dataset and write it as array_record, or prepare one of our own.

    ValueError for an unknown name, RuntimeError if TensorFlow, which TFDS needs to encode most
    datasets, is missing.
    """
    if name not in OWN:
        check_known(name)
        _download(name, data_dir)
    dataset = open_dataset(name, data_dir=data_dir, root=root)
    sizes = ", ".join(f"{split} {size}" for split, size in dataset.sizes.items())
    print(f"{name} is prepared in {dataset.builder.data_dir}: {sizes}.")


def _download(name: str, data_dir: str) -> None:
    if importlib.util.find_spec("tensorflow") is None:
        raise RuntimeError(
            f"Preparing {name} needs TensorFlow, reading it does not; "
            "install it with pip install 'equiadapt-jax[prepare]'."
        )
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    builder.download_and_prepare()


def main() -> None:
    """Parse the command line and prepare the dataset; errors end it with one sentence."""
    parser = argparse.ArgumentParser(description="Prepare a dataset as array_record.")
    parser.add_argument("name", help=f"{', '.join(OWN)}, or a name that TFDS knows")
    parser.add_argument("--data_dir", default="", help="where to write; TFDS's default if empty")
    parser.add_argument(
        "--root", default="", help="of image_folder and rotated_mnist: where the files lie"
    )
    flags = parser.parse_args()
    try:
        prepare(flags.name, data_dir=flags.data_dir, root=flags.root)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
