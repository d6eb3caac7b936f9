"""``python -m zeroflow.cli`` is the command ``zeroflow``."""

from zeroflow.cli import main

if __name__ == "__main__":
    main(prog_name="zeroflow")
