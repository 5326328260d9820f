"""Supervised warm start on corrective traces."""
