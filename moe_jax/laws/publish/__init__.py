"""A report as one HTML page with its pictures inside, and as PNG, CSV and Markdown beside it."""
