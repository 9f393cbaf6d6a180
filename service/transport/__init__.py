"""Translations between the wire and the core; nothing is decided here."""
