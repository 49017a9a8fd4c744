"""A page in the browser to play with erasers: draw, train, read reports, compare."""
