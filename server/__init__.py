"""Requests over HTTP, and the command line."""
