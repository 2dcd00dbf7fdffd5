"""Trained students: reading, writing, conversion, prediction and export."""
