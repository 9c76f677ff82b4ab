"""Turns documents into the rows of a run. Does not import torch."""
