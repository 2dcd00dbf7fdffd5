"""The papers' published checkpoint formats: :mod:`fastokd.student.authors` under its public name."""

from fastokd.student.authors import Published, load, read, save

__all__ = ["Published", "load", "read", "save"]
