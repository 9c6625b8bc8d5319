"""Measurements of speed, and models of real shapes with random weights to measure."""
