"""`python -m edgepeft` is the same program as `edgepeft`."""

from edgepeft.cli import main

if __name__ == "__main__":
    main()
