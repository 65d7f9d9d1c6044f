"""`python3 -m luthier` is `luthier`."""

from luthier.cli import entry

if __name__ == "__main__":
    entry()
