"""What a stage writes for others to read: results/<stage>/<name>.json, as frozen dataclasses.

These files are what DVC tracks: small, and written whole or not at all. No other room spells a path below results/.
"""
