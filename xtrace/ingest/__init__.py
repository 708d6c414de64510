"""Readers: from trace files to events."""
