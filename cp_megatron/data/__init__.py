"""Data: text files to tokens, tokens to rows, rows to batches.

``sources`` reads text (no torch), ``sampler`` says which row is number i of the run (no torch),
``packing`` how a row is masked and padded (no torch), ``batch`` cuts a global batch for one data
parallel rank, ``ahead`` makes the next one meanwhile. Importing this package imports no torch.
"""
