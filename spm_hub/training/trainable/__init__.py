"""What is trained: low-rank, dense, null-space and mask increments, and PEFT's kinds."""
