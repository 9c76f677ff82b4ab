"""Evaluation of a model on long rows: perplexity by position, needles, reports."""
