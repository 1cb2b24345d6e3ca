"""Files of a model for other runtimes, one module a format; compared with PyTorch in its runtime before it counts as written.

Well-kept exporters do the work. What is here chooses their settings, lays the files out where users look for them, and compares.
"""

from .folder import FORMATS, ExportReport, check_export, export_model

__all__ = ["FORMATS", "ExportReport", "check_export", "export_model"]
