"""Ranks and wires: environment, mesh, collectives, flat buckets, the gradient path."""
