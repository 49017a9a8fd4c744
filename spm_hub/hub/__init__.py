"""Where erasers are kept and found: registries on disk, and the Hugging Face Hub."""
