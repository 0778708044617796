"""Volumes as clients see them: exports and their settings."""
