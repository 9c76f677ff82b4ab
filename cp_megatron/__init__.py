"""cp_megatron: tensor, context and data parallel training of transformers.

Importing this package imports no torch, so a wrong flag is reported before torch is loaded.
"""

__version__ = "0.1.0"
