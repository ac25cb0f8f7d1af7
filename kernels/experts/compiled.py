"""`Experts` as Triton kernels."""

from __future__ import annotations

from .products import moe as moe
from .routing import route as route
from .routing import route_groups as route_groups
