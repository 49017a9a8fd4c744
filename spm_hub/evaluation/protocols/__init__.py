"""Protocols as data: what is drawn, measured and compared, and the numbers that papers published."""
