"""What users write down for xtrace, one subject a file.

``sidecar`` says what a trace does not, ``hostinfo`` reads what a host says about itself, ``settings`` finds the options
and suppressions of a project (``options`` and ``suppressions`` read them), ``checks`` is what all of them check with.
"""

from __future__ import annotations

from xtrace.config.checks import CALLERS, ROLES
from xtrace.config.hostinfo import HostInfo, HostLine, read_host_info
from xtrace.config.sidecar import DomainInfo, Sidecar, find_sidecar, load_sidecar, read_sidecar

__all__ = (
    "CALLERS",
    "ROLES",
    "DomainInfo",
    "HostInfo",
    "HostLine",
    "Sidecar",
    "find_sidecar",
    "load_sidecar",
    "read_host_info",
    "read_sidecar",
)
