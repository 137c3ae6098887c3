"""A model-efficiency pipeline: every stage's GPU-hours and quality measured (`python -m pipeline recipe=distill`)."""

__version__ = "0.1.0"
