"""Printing and drawing schedules."""
