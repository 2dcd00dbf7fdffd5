"""Runs listed, cleaned and watched."""
