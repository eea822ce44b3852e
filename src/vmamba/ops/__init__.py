"""The mathematics of VMamba: routes, the selective scan, and their fused form. Imports torch alone."""

import vmamba.ops.linear.whole  # noqa: F401  (exported programs call its operator)
from vmamba.ops.routes import cross_merge, cross_scan
from vmamba.ops.s6.api import selective_scan
from vmamba.ops.ss2d.api import ss2d_scan

__all__ = ["cross_merge", "cross_scan", "selective_scan", "ss2d_scan"]
