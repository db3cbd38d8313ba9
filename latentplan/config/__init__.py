"""The configuration: its schema, where values come from, and which values are valid."""
