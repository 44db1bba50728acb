"""``python -m protoseg``, the same as the command ``protoseg``."""

from protoseg.recipes.cli import main

if __name__ == "__main__":
    main()
