"""Data: text files, indexed files and conversations to tokens, tokens to rows, rows to batches.

``corpora`` goes from the paths a user names to the rows of the run, by ``sources`` (text),
``json_lines``, ``indexed`` (.bin/.idx) and ``chat``, each with a ``tokenizer``. ``sampler`` says
which row is number i of the run, ``best_fit`` packs whole documents into rows, ``blend`` mixes
datasets; ``packing`` masks and pads a row. ``batch`` cuts a global batch for one data parallel rank
(the only file here that imports torch), ``ahead`` makes the next one meanwhile.
"""
