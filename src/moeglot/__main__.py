"""`python -m moeglot`: the command line, for an interpreter whose scripts are not on the path."""

from moeglot.cli.main import main

if __name__ == "__main__":
    main()
