"""The command line; `python -m moeglot` and the script enter at `main`."""
