"""What a model is, as data: its parameters, where they lie, what they cost. No torch."""
