"""``python -m selfpruner``."""

from selfpruner.cli.app import main

if __name__ == "__main__":
    main()
