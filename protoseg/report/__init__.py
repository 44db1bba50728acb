"""One HTML page that shows what a run found, and maps and masks laid over pictures."""

from protoseg.report.gallery import Picture
from protoseg.report.overlays import overlay
from protoseg.report.page import write_report

__all__ = ["Picture", "overlay", "write_report"]
