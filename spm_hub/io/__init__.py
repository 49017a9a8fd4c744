"""Files, JSON, the Hub's client and environment variables: nothing here knows what an eraser is."""
