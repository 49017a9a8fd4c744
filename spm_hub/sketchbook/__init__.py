"""The sketchbook: a small base model, its training data of 64x64 drawings, and a probe as judge.

It imports nothing else of spm_hub. With it erasers can be trained and measured on any machine without a download.
"""
