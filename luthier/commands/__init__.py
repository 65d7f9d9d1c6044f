"""What is not training."""
