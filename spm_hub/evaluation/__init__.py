"""Measuring erasers: pictures with and without them, what is detected in those, and how they are shown."""
