"""PyTorch: what it does better than the reference."""
