"""Metrics: metrics.jsonl, TensorBoard, Weights & Biases, and plots."""
