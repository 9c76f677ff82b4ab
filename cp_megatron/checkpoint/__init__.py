"""Checkpoints: safetensors shards and one JSON manifest; any grid loads any other; no pickle.

``manifest`` reads and checks without torch, ``storage`` is torch.distributed.checkpoint's storage,
``store`` saves and loads a model and its optimizer. Importing this package imports no torch.
"""
