"""``python -m fastroute``."""

from fastroute.cli import main

if __name__ == "__main__":
    main(prog_name="fastroute")
