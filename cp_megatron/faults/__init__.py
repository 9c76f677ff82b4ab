"""Faults during training: the guard, checks, the watch, stragglers, and fault injection."""
