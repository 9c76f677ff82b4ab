"""Checks and decisions that are made before torch is loaded."""
