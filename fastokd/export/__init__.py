"""The student that a run leaves, for other libraries."""

from fastokd.export.checked import FORMATS, Export, export

__all__ = ["FORMATS", "Export", "export"]
