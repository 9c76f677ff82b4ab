"""The memory of a rank: predicted, measured, reported."""
