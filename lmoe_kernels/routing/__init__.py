# SPDX-License-Identifier: Apache-2.0
"""What gates do: statistics of the router logits of a model, text by expert, and a report with pictures."""

from lmoe_kernels.routing.report import Report, show, write_report
from lmoe_kernels.routing.stats import RoutingStats
from lmoe_kernels.routing.sums import RoutingSums, load_stats
from lmoe_kernels.routing.text import TextRouting, routing_of_text

__all__ = ["Report", "RoutingStats", "RoutingSums", "TextRouting", "load_stats", "routing_of_text", "show", "write_report"]
