"""Publishes a report as a self-contained HTML page, with PNG, CSV and Markdown files next to it."""
