"""Summaries of many runs -> tables and pictures. Reads run folders; no torch."""
