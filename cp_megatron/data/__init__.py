"""Data: text files to tokens, tokens to rows, rows to batches.

``sources`` reads text (no torch), ``sampler`` says which row is number i of the run (no torch),
``batch`` cuts a global batch for one data parallel rank. Importing this package imports no torch.
"""
