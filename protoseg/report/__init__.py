"""One HTML page that shows what a run found, and maps and masks laid over pictures."""

from protoseg.report.overlays import overlay
from protoseg.report.page import Picture, write_report

__all__ = ["Picture", "overlay", "write_report"]
