"""Turns rows into the batches of one data parallel rank, as tensors."""
