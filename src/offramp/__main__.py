"""`python -m offramp`, which launchers of several processes want: `accelerate launch -m offramp train ...`."""

from offramp.cli import main

if __name__ == "__main__":
    main()
