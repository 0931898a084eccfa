"""`python -m offramp`, which launchers of several processes want: `accelerate launch -m offramp train ...`."""

from offramp.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
