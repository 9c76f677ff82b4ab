"""Data: files to tokens, tokens to rows, rows to batches.

``tokenize/`` turns text into ids. ``read/`` reads text files, JSON lines, conversations and indexed
files (.bin/.idx) as documents of tokens. ``rows/`` cuts or packs documents into rows, mixes
datasets, and decides which row is number i of the run. ``batch/`` makes the batches of one data
parallel rank; it is the only part that imports torch. ``prepare/`` writes .bin/.idx ahead of a run.
"""
