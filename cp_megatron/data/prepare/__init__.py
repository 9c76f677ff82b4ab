"""Text to Megatron's .bin/.idx, ahead of a run. No torch."""
