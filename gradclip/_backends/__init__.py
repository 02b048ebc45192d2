"""The work on arrays: a generic reference, and what single libraries do better."""
