"""What one training step changes, and the step."""
