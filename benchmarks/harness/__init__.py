"""What the benchmarks share: processes that are timed in turns, and what they run."""
