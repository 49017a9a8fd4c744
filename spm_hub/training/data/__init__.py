"""Training data: prompts, anchors, and the sources of x_t and its targets."""
