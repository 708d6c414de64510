"""From continuations to findings."""
