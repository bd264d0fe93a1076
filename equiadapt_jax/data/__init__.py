"""Datasets and batches: TFDS builders read as array_record, and Grain pipelines on top.

Importing this package loads neither TFDS nor Grain; opening a dataset does.
"""

from equiadapt_jax.data.batches import array_batches, evaluation_batches, training_batches
from equiadapt_jax.data.datasets import Dataset, open_dataset
from equiadapt_jax.data.fitting import fit, to_unit

__all__ = [
    "Dataset",
    "array_batches",
    "evaluation_batches",
    "fit",
    "open_dataset",
    "to_unit",
    "training_batches",
]
