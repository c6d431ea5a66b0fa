"""Measured comparisons: one timer, peers imported from their packages, one file per op. Not installed with kdfast."""
