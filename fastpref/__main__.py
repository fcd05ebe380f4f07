"""`python -m fastpref` is the command `fastpref`."""

from fastpref.cli import main

if __name__ == "__main__":
    main()
