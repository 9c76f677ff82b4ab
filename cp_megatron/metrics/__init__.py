"""What a run leaves for people and programs: metrics, plots, Weights & Biases."""
