"""Schedules printed and drawn. No torch."""
