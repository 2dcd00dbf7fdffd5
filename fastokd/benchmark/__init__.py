"""Timing training steps: ours and the published loop's, on the same drawn data."""
