"""Upgrades legacy PyTorch transformer code, and proves what each rewrite did."""

__version__ = "0.1.0"
