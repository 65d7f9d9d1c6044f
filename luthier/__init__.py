"""Post-training for open language models in JAX."""

__version__ = "0.1.0"
