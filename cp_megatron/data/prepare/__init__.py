"""Turns text into Megatron's .bin/.idx, ahead of a run. Does not import torch."""
