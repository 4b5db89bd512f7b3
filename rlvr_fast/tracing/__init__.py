"""Objectives: what they see, how they compose, and how they become a Triton device function."""
