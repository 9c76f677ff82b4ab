"""cp_megatron: tensor, context and data parallel training of transformers.

Importing this package imports no torch: a wrong flag is answered before torch is loaded.
"""

__version__ = "0.1.0"
