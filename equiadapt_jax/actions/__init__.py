"""What a group element does to data."""

from equiadapt_jax.actions import images

__all__ = ["images"]
