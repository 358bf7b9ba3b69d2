"""`python -m megatune` is the command line."""

from megatune.cli import main

if __name__ == "__main__":
    main()
