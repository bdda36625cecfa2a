"""One page about one or several training runs."""

from __future__ import annotations

from fss.report.page import write_report

__all__ = ["write_report"]
