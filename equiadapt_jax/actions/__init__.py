"""What a group element does to data."""

from equiadapt_jax.actions import annotations, fields, images, squares, vectors

__all__ = ["annotations", "fields", "images", "squares", "vectors"]
