"""Saved guests: migration and save streams, and core dumps, opened as vCPUs with registers and memory that can be read.

Nothing is concluded here about hypercalls; `xtrace.inspection` joins this room with replay and analyze.
"""
