"""Reads and writes configuration files; presets and run folders."""
