"""What the benchmarks share: processes that take turns, and what they run."""
