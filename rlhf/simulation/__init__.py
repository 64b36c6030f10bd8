"""Simulated raters. They live in a process of their own, and meet the platform only through its HTTP API."""
