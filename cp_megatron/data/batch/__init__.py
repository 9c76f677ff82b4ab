"""From rows to one data parallel rank's batches, as tensors."""
