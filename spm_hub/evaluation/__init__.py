"""Measures erasers: draws pictures with and without them, counts detections, runs attacks."""
