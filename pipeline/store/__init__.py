"""Artifacts on disk by content, records by key, locks; and what is read from files with care."""
