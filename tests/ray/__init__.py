"""Tests that need a local Ray cluster."""
