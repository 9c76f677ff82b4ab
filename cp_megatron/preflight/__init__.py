"""Checks and decisions that are made before torch is loaded.

All of it runs before torch is loaded except ``start.py``, which starts the ranks once the plan is
made.
"""
