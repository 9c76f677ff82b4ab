"""Training: the run, the loop, the step, the optimizer, saving, resuming, and stopping."""
