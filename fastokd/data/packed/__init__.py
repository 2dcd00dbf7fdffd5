"""Data sets whose images are packed into files: each image is a range of bytes."""
