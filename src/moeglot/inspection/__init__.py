"""What is worth knowing of a folder: what `inspect` shows, and who would misread it."""
