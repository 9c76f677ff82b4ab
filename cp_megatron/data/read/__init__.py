"""Turns files into documents of tokens. Does not import torch."""
