"""Prompt sets: files of prompts, read by their columns, and a catalogue of published ones."""
