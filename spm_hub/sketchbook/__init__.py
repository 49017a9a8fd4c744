"""The sketchbook: a small base model, its training data of 64x64 drawings, and a probe as judge.

It imports nothing else of spm_hub. With it erasers can be trained and measured on any machine without a download.
"""

PROTOCOL = "sketchbook-detection"
"""The name, in manifests, of the way in which `spmhub eval` counts the concepts that the probe detects."""
