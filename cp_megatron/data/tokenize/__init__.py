"""Turns text into token ids and back. Does not import torch."""
