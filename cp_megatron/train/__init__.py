"""Training: what is checked before, the step, the loop, what a person sees."""
