"""``python -m birdcall``: the command line."""

from birdcall.cli import main

if __name__ == "__main__":
    main()
