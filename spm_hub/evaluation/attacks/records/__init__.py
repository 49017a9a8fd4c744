"""Records of attacks: every judged picture is kept, in a folder that can be resumed and judged again."""
