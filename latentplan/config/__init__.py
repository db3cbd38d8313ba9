"""The configuration: its schema, the sources of its values, and the checks of its values."""
