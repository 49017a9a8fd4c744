"""What is trained on: prompts, anchors, and where x_t and its targets come from."""
