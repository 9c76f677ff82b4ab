"""Hugging Face model families: one file per family, config.json and tensor names both ways.

A family reads config.json as the flags of ``ModelConfig``, writes config.json from them, and names
its tensors. To add one, define a ``Family`` (``family.py``) in a file of its own and list it in
``registry.py``. This package does not import torch.
"""
