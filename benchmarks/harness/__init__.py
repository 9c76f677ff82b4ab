"""Shared code of the benchmarks: processes that are timed in turns, and the work they run."""
