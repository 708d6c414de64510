"""The modelled hypervisor, run: calls of an abstract guest executed on a release, preempted anywhere, resumed on another."""
